"""`rekatrain chat EXPORT`: talk to an export in the terminal, over several rounds, with the reasoning dimmed.

The model is loaded with transformers, or a server that speaks OpenAI's protocol answers (`--url`). A turn ends at
`<sep>`. Ctrl-C ends the answer that is being written, Ctrl-D the conversation.
"""

import io
import sys
from collections.abc import Iterator
from contextlib import closing
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.text import Text

from rekatrain.data.chat import REASONING_CLOSE, REASONING_OPEN, STOP, Message, parse_completion
from rekatrain.data.errors import InputError
from rekatrain.trainer.chat_answers import Answer, answers_of_export, answers_of_server

TAGS = (REASONING_OPEN, REASONING_CLOSE, STOP)
# Control characters could move the cursor or set the title of the reader's terminal.
CONTROL = dict.fromkeys([code for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"])


def chat(
    export: Path | None, *, url: str | None = None, model: str | None = None, console: Console | None = None
) -> None:
    """Read questions from the terminal and print the answers, until the input ends.

    export: a folder of `rekatrain export`, merged or an adapter
    url:    of a server that speaks OpenAI's protocol, such as http://127.0.0.1:8000/v1, instead of an export
    model:  name of a model of the server that serves several
    """
    console = console or Console(highlight=False)
    if (export is None) == (url is None):
        raise InputError("chat needs one of two: the folder of an export, or --url of a server")
    if url is not None:
        name, answer = answers_of_server(url, model)
    elif model is not None:
        raise InputError("--model names a model of a server: it goes with --url")
    else:
        name, answer = str(export), answers_of_export(Path(export or ""))
    if sys.stdin.isatty():
        _note(f"{name}: Ctrl-C ends an answer, Ctrl-D the conversation", "dim", console)
    talk(answer, console)


def talk(answer: Answer, console: Console) -> None:
    """Run a conversation; an error ends it where the questions come from no terminal, and the round where they do."""
    interactive = sys.stdin.isatty()
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")  # a question of other bytes than UTF-8
    if interactive and find_spec("readline"):
        import_module("readline")  # input() then edits lines, and takes more than the terminal's 4,096 characters
    messages: list[Message] = []
    while True:
        try:
            question = input("> " if interactive else "").strip()
        except KeyboardInterrupt:
            _note("\n(Ctrl-D ends the conversation)", "dim", console)
            continue
        except EOFError:
            if interactive:
                console.print()
            return
        if not question:
            continue
        if any(tag in question for tag in TAGS):
            _note(f"a question cannot contain {', '.join(TAGS)}: the format has no escape", "red", console)
            continue
        try:
            messages = ask(messages, question, answer, console)
        except InputError as error:
            if not interactive:
                raise
            _note(f"error: {error}; this question is left out", "red", console)


def ask(messages: list[Message], question: str, answer: Answer, console: Console) -> list[Message]:
    """Print the answer to a question; return the conversation with both, or without them where no answer was given."""
    asked: list[Message] = [*messages, {"role": "user", "content": question}]
    text = show(answer(asked), console)
    # A tag that the model wrote inside its answer would end or open a part of the next prompt.
    while any(tag in text for tag in TAGS):
        for tag in TAGS:
            text = text.replace(tag, "")
    if not text.strip():
        _note("(no answer: this question is left out of the next prompt)", "dim", console)
        return messages
    return [*asked, {"role": "assistant", "content": text}]


def _note(text: str, style: str, console: Console) -> None:
    """Print a line of this program, which is no answer."""
    console.print(Text(text, style=style), soft_wrap=True)


def show(chunks: Iterator[str], console: Console) -> str:
    """Print a streamed turn, its reasoning dimmed, up to `<sep>` or Ctrl-C; return the answer without the reasoning."""
    text, shown = "", {"reasoning": "", "answer": ""}
    try:
        with closing(chunks):  # type: ignore[type-var]  # generators, which stop their source when they are closed
            for chunk in chunks:
                text += chunk
                _print_new(text[: len(text) - _partial_tag(text)], shown, console)
                if STOP in text:
                    break
            _print_new(text, shown, console)
    except KeyboardInterrupt:
        console.print(" (stopped)", style="dim", end="")
    finally:
        if any(shown.values()):
            console.print()
    return shown["answer"]


def _print_new(text: str, shown: dict[str, str], console: Console) -> None:
    """Print what a longer text has more than was shown."""
    parsed = parse_completion(text)
    for part, value, style in (("reasoning", parsed.reasoning or "", "dim"), ("answer", parsed.answer, "")):
        new = value[len(shown[part]) :]
        if new:
            gap = "\n\n" if part == "answer" and not shown["answer"] and shown["reasoning"] else ""
            shown[part] = value  # first: Ctrl-C may come while it is printed
            console.print(Text(gap + new.translate(CONTROL), style=style), end="", soft_wrap=True)


def _partial_tag(text: str) -> int:
    """Return the number of characters at the end that may become a tag."""
    return max((n for tag in TAGS for n in range(1, len(tag)) if text.endswith(tag[:n])), default=0)
