"""Servers and trainers of a launch, with small programs in their place: statuses, restarts, signals, no leftovers."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from rekatrain.data.errors import TrainingStopped
from rekatrain.trainer.launch.output import Output
from rekatrain.trainer.launch.processes import Command
from rekatrain.trainer.launch.servers import Server, Servers
from rekatrain.trainer.launch.supervise import Supervisor

# Serves /health, with a child as vLLM has; dies when a file appears.
SERVER = """
import http.server, os, pathlib, subprocess, sys, threading, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
with open("children", "a") as file:
    file.write(f"{child.pid}\\n")
def watch():
    while not os.path.exists("die"):
        time.sleep(0.02)
    os.remove("die")
    print("ValueError: no room for the cache", flush=True)
    os._exit(9)
threading.Thread(target=watch, daemon=True).start()
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *_):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


# Of a trainer whose line has been read when the file `started` is there.
BEGINS = "echo begins; sleep 0.3; touch started"


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def usual_signals() -> Iterator[None]:
    """Signals that a background job or nohup ignores end a process here, as in a terminal."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def server(script: str = SERVER) -> Server:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = Command(name="server", argv=[sys.executable, "-c", script, str(port)])
    return Server(command=command, url=f"http://127.0.0.1:{port}")


def trainer(script: str, name: str = "trainer") -> Command:
    return Command(name=name, argv=["bash", "-c", script, "trainer"])


def run(
    servers: list[Server], *trainers: Command, max_restarts: int = 1, start_timeout: float = 60, **options: bool
) -> int:
    output = Output(["server", "trainer"])
    group = Servers(servers, output, start_timeout=start_timeout, max_restarts=max_restarts)
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    try:
        return Supervisor(group, trainers, output, **options).run()
    finally:
        left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
        assert left == []
        for line in Path("children").read_text().split() if Path("children").exists() else []:
            assert not psutil.pid_exists(int(line))


def later(action) -> None:
    """Do something in another thread once the trainer has made the file `started`."""

    def wait() -> None:
        while not Path("started").exists():
            time.sleep(0.01)
        action()

    threading.Thread(target=wait, daemon=True).start()


@pytest.mark.parametrize("status", [0, 1, 2, 75])
def test_status_is_that_of_the_trainer(status: int, capfd: pytest.CaptureFixture[str]) -> None:
    slow = server(f"import time; time.sleep(1)\n{SERVER}")  # one that responds at once is not waited for
    assert run([slow], trainer(f"echo a line of it; exit {status}")) == status
    shown = capfd.readouterr().err
    assert "rekatrain: waiting for 1 vLLM server(s) | servers 0/1 up" in shown
    assert "rekatrain: training | servers 1/1 up" in shown and "\n[trainer] a line of it\n" in shown


def test_trainer_that_is_killed_is_named(capfd: pytest.CaptureFixture[str]) -> None:
    assert run([], trainer("echo step 3; kill -9 $$")) == 137
    why = "killed by SIGKILL, as the kernel does when memory runs out; its last line: step 3"
    assert f"rekatrain: trainer ended with status 137: {why}. Go on with --resume" in capfd.readouterr().err


def test_trainer_starts_alone_without_servers() -> None:
    assert run([], trainer("exit 3")) == 3


def test_first_failure_of_several_trainers_ends_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rekatrain.trainer.launch.supervise.TRAINER_END_SECONDS", 0.5)
    assert run([], trainer("sleep 600", "trainer 0"), trainer("exit 1", "trainer 1")) == 1


def test_interrupted_trainer_may_save_while_others_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rekatrain.trainer.launch.supervise.TRAINER_END_SECONDS", 0.1)
    trainers = trainer("sleep 1; exit 75", "trainer 0"), trainer("exit 75", "trainer 1")
    assert run([], *trainers) == 75


def test_server_that_dies_is_started_again(capfd: pytest.CaptureFixture[str]) -> None:
    # Ends when the second server is there.
    script = "touch started; while [ $(wc -l <children) -lt 2 ]; do sleep 0.05; done; sleep 1.5"
    later(lambda: Path("die").touch())
    assert run([server()], trainer(script)) == 0
    shown = capfd.readouterr().err
    assert "server died with status 9 (ValueError: no room for the cache): restart 1 of 1" in shown
    assert len(Path("children").read_text().split()) == 2


def test_server_that_dies_too_often_ends_the_run_saved() -> None:
    script = "trap 'touch saved; exit 75' TERM; touch started; while :; do sleep 0.05; done"
    later(lambda: Path("die").touch())
    with pytest.raises(
        TrainingStopped, match="server died 1 times, last with status 9: ValueError: no room .*--resume"
    ):
        run([server()], trainer(script), max_restarts=0)
    assert Path("saved").exists()


def test_server_that_dies_too_often_is_the_reason_before_the_first_step() -> None:
    later(lambda: Path("die").touch())
    with pytest.raises(TrainingStopped, match="server died 1 times, last with status 9: ValueError: no room"):
        run([server()], trainer("touch started; exec sleep 600"), max_restarts=0)


def test_server_that_needs_the_gpus_restarts_the_trainer() -> None:
    script = 'trap \'exit 75\' TERM; echo "x$@" >>starts; touch started; [ "$1" = --resume ] && exit 0; '
    script += "while :; do sleep 0.05; done"
    later(lambda: Path("die").touch())
    assert run([server()], trainer(script), restarts_trainers=True) == 0
    assert Path("starts").read_text() == "x\nx--resume\n"


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (
            "print('INFO start'); raise RuntimeError('out of memory')",
            "ended with status 1 .*: RuntimeError: out of memory",
        ),
        (
            "import time; print('loading', flush=True); time.sleep(600)",
            "is not ready after 1 s; its last line: loading;",
        ),
        (
            "import os; os.kill(os.getpid(), 9)",
            "ended with status 137 .*: killed by SIGKILL, as the kernel .* it printed nothing",
        ),
    ],
)
def test_server_that_does_not_start_is_one_error(script: str, error: str) -> None:
    with pytest.raises(TrainingStopped, match=f"^server {error}"):
        run([server(script)], trainer("exit 0"), start_timeout=1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_signal_is_handed_on_and_the_trainer_may_save(number: signal.Signals) -> None:
    name = number.name.removeprefix("SIG")
    script = f"trap 'sleep 0.5; touch saved; exit 75' {name}; {BEGINS}; while :; do sleep 0.05; done"
    later(lambda: os.kill(os.getpid(), number))
    assert run([server()], trainer(script)) == 75
    assert Path("saved").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("begins", ["touch started", BEGINS], ids=["imports", "does not listen yet"])
def test_signal_before_the_first_step_is_one_line(
    number: signal.Signals, begins: str, capfd: pytest.CaptureFixture[str]
) -> None:
    later(lambda: os.kill(os.getpid(), number))
    # A shell's background jobs ignore SIGINT, and so does this one unless it resets it.
    assert run([server()], trainer(f"trap - INT; {begins}; exec sleep 600")) == 75
    lines = [line for line in capfd.readouterr().err.splitlines() if "interrupted" in line]
    assert lines == [
        f"rekatrain: interrupted by {number.name} before its first step: nothing is lost. Start it again with --resume"
    ]


def test_hangup_lets_the_trainer_save_as_sigterm_does() -> None:
    script = f"trap 'exit 75' TERM; {BEGINS}; while :; do sleep 0.05; done"
    later(lambda: os.kill(os.getpid(), signal.SIGHUP))
    assert run([], trainer(script)) == 75


def test_second_signal_ends_a_trainer_that_hangs(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rekatrain.trainer.launch.supervise.TRAINER_KILL_SECONDS", 0.2)
    script = f"trap '' TERM; {BEGINS}; while :; do sleep 0.05; done"

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)

    later(twice)
    assert run([server()], trainer(script)) == 137
    assert "trainer ended with status 137: killed by SIGKILL by this launch, as it" in capfd.readouterr().err


def test_signal_while_servers_start_ends_with_75() -> None:
    later(lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert run([server("import time; open('started', 'w'); time.sleep(600)")], trainer("touch trained")) == 75
    assert not Path("trained").exists()


def test_killed_keepers_leave_nothing() -> None:
    def kill() -> None:
        for child in psutil.Process().children():
            with suppress(psutil.ZombieProcess):  # of another test
                if "keep.py" in " ".join(child.cmdline()):
                    child.kill()

    later(kill)
    assert run([server()], trainer("sleep 600 & touch started; sleep 600"), max_restarts=0) == 137


def test_servers_that_share_gpus_all_start_again() -> None:
    script = "trap 'exit 75' TERM; touch started; [ \"$1\" = --resume ] && exit 0; while :; do sleep 0.05; done"
    later(lambda: Path("die").touch())  # one of the two reads it
    assert run([server(), server()], trainer(script), restarts_trainers=True) == 0
    assert len(Path("children").read_text().split()) == 4


def test_trainer_that_finds_a_shared_server_gone_resumes() -> None:
    script = '[ "$1" = --resume ] && exit 0; touch die; while [ -e die ]; do :; done; exit 2'
    assert run([server()], trainer(script), restarts_trainers=True) == 0


# A terminal of 60 columns, whose text is printed at the end.
PTY = """
import os, pty, sys
pid, terminal = pty.fork()
if pid == 0:
    from rekatrain.trainer.launch.output import Output
    output = Output(["server", "trainer"])
    output.status("waiting for 1 vLLM server(s)", "servers 0/1 up")
    output.line("server", "loading")
    output.status("training", "servers 1/1 up")
    output.line("trainer", "step 1/3  reward 0.5  eta 0m10s")
    output.line("trainer", "a line")
    output.line("server", "launcher.py:70] Route: /docs, Methods: GET")
    output.close()
    os._exit(0)
text = b""
while True:
    try:
        read = os.read(terminal, 1000)
    except OSError:
        break
    text += read
sys.stdout.write(text.decode())
"""


def test_terminal_has_one_progress_line() -> None:
    shown = subprocess.run([sys.executable, "-c", PTY], stdout=subprocess.PIPE).stdout.decode()
    # A line that was cleared is none: what is left of each is after its last clearing.
    lines = [line.rpartition("\r\x1b[K")[2] for line in shown.replace("\r\n", "\n").split("\n")]
    assert lines == ["[server]  loading", "[trainer] a line", ""], shown
    assert "step 1/3  reward 0.5  eta 0m10s | servers 1/1 up | 0m00s" in shown
