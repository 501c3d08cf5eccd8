"""`rekatrain chat` in a pseudo-terminal, as a user types: long lines, other bytes than UTF-8, Ctrl-C and Ctrl-D."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from tests.package.processes import environment

ANSWER = " <reasoning>\nTwice 3.\x1b]0;title\x07\n</reasoning>\n\n6"
DIM, RESET = "\x1b[2m", "\x1b[0m"
ENTER, CTRL_C, CTRL_D = b"\r", b"\x03", b"\x04"


def delta(content: str) -> bytes:
    return f"data: {json.dumps({'choices': [{'delta': {'content': content}}]})}\n\n".encode()


def reply(path: str, body: Any) -> tuple[int, Any]:  # JSON
    """Return the models, or ANSWER in small deltas; an endless one to `endless`, an error to `fail`, a tag to `tag`."""
    if body is None:
        return 200, {"data": [{"id": "base", "parent": None}, {"id": "adapter", "parent": "base"}]}
    question = body["messages"][-1]["content"]
    if question == "endless":
        return 200, (delta("on and ") for _ in iter(lambda: time.sleep(0.02), 0))
    if question == "fail":
        return 200, b'data: {"error": {"message": "the context is full"}}\n\n'
    parts = ["a</reasoning>b"] if question == "tag" else re.findall(r"(?s).{1,5}", ANSWER)
    return 200, b"".join(map(delta, parts))


def own_terminal() -> None:
    """Make standard input the terminal of the new session, which Ctrl-C in it interrupts."""
    os.close(os.open(os.ttyname(0), os.O_RDWR))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell that runs the tests in the background has them ignore it


class Terminal:
    """A command that runs in a pseudo-terminal, and what it has printed."""

    def __init__(self, *arguments: str, **variables: str) -> None:
        self.screen, self._seen = "", 0
        self._fd, theirs = pty.openpty()
        command = [sys.executable, "-m", "rekatrain", "chat", *arguments]
        options = {"stdin": theirs, "stdout": theirs, "stderr": theirs, "env": environment() | variables}
        self.process = subprocess.Popen(command, start_new_session=True, preexec_fn=own_terminal, **options)
        os.close(theirs)

    def type(self, keys: bytes) -> None:
        for start in range(0, len(keys), 512):
            os.write(self._fd, keys[start : start + 512])
            self._read(0.02)

    def interrupt(self, text: str) -> None:
        """Press Ctrl-C until a prompt notices: Python overlooks one that comes just before it waits for a key."""
        for _ in range(20):
            self.type(CTRL_C)
            pressed = time.monotonic()
            while text not in self.screen[self._seen :] and time.monotonic() < pressed + 5:
                self._read(0.5)
            if text in self.screen[self._seen :]:
                break
        self.wait(text)

    def wait(self, text: str) -> str:
        """Return what was printed since the last call, through `text`."""
        deadline = time.monotonic() + 120
        while text not in self.screen[self._seen :]:
            assert time.monotonic() < deadline and self._read(1), self.screen[self._seen :]
        start, self._seen = self._seen, self.screen.index(text, self._seen) + len(text)
        return self.screen[start : self._seen]

    def _read(self, seconds: float) -> bool:
        """Read what there is; return False at the end."""
        if select.select([self._fd], [], [], seconds)[0]:
            try:
                text = os.read(self._fd, 65536).decode(errors="replace")
                self.screen += re.sub(r"\r|\x1b\[\?2004[hl]", "", text)  # readline announces how it takes a paste
            except OSError:  # the process has closed its terminal
                return False
        return True


def test_conversation_in_a_terminal(serve) -> None:
    server = serve(reply)
    terminal = Terminal("--url", server.url, TERM="xterm")
    assert "adapter: Ctrl-C ends an answer, Ctrl-D the conversation" in terminal.wait("> ")
    long = "é" * 6000  # 12,000 bytes: a terminal's own line has at most 4,095
    for question in (long.encode(), "你好 \U0001f642".encode(), b"\xff!"):
        terminal.type(question + ENTER)
        screen = terminal.wait("\n> ")
        assert screen.replace(RESET + DIM, "").endswith(f"{DIM}Twice 3.]0;title{RESET}\n\n6\n> ")
    terminal.type(b"  " + ENTER)
    terminal.wait("\n> ")
    terminal.type(b"half")
    terminal.wait("half")
    terminal.interrupt("(Ctrl-D ends the conversation)")
    for question, shown in (
        (b"<sep>", "a question cannot contain"),
        (b"fail", "the context is full; this question is left out"),
        (b"tag", "a</reasoning>b"),
    ):
        terminal.wait("\n> ")
        terminal.type(question + ENTER)
        terminal.wait(shown)
    terminal.wait("\n> ")
    terminal.type(b"endless" + ENTER)
    terminal.wait("on and on and")
    terminal.type(CTRL_C)
    terminal.wait("(stopped)")
    terminal.wait("\n> ")
    terminal.type(b"last" + ENTER)
    terminal.wait("\n> ")
    terminal.type(CTRL_D)
    assert terminal.process.wait(60) == 0
    assert {body["model"] for body in server.bodies[1:]} == {"adapter"}
    *questions, last = [turn["content"] for turn in server.bodies[-1]["messages"]]
    assert last == "last" and questions[:4] == [long, "6", "你好 \U0001f642", "6"]
    assert questions[4].endswith("!") and questions[6:9] == ["tag", "ab", "endless"]
    assert questions[9].startswith("on and on and") and len(questions) == 10


@pytest.mark.parametrize("variables", [{"NO_COLOR": "1", "TERM": "xterm"}, {"TERM": "dumb"}], ids=["NO_COLOR", "dumb"])
def test_terminal_without_colors(serve, variables: dict[str, str]) -> None:
    terminal = Terminal("--url", serve(reply).url, **variables)
    terminal.wait("> ")
    terminal.type(b"<sep>" + ENTER)
    screen = terminal.wait("has no escape") + terminal.wait("\n> ")  # Ctrl-D before the prompt is lost
    terminal.type(CTRL_D)
    assert terminal.process.wait(60) == 0
    assert "\x1b[31m" not in screen and ("NO_COLOR" in variables or DIM not in screen)


def test_questions_from_a_pipe(serve) -> None:
    command = [sys.executable, "-m", "rekatrain", "chat", "--url", serve(reply).url]
    done = subprocess.run(command, input=b"one\n\ntwo\n\xff\n", capture_output=True, env=environment(), timeout=120)
    assert done.returncode == 0 and done.stderr == b"" and done.stdout == b"Twice 3.]0;title\n\n6\n" * 3
    done = subprocess.run(command, input=b"fail\none\n", capture_output=True, env=environment(), timeout=120)
    assert done.returncode == 2 and done.stdout == b"" and done.stderr.count(b"\n") == 1
