"""The rows that a synthesis writes: JSON lines in the layout `messages`, which every stage reads."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rekatrain.data.chat import Message, check_messages, parse_completion
from rekatrain.data.errors import InputError
from rekatrain.data.rows import Row
from rekatrain.trainer.synthesis.journal import Answer

Turn = dict[str, Any]


def answered_messages(row: Row, answer: Answer) -> list[Turn]:
    """Return the prompt of a row and a completion of it, of which SFT trains the completion alone.

    Raises InputError for a completion without an answer, and for one whose text the chat format cannot hold.
    """
    parsed = parse_completion(answer.text)
    if not parsed.answer:
        raise InputError("the completion has no answer")
    message: Message = {"role": "assistant", "content": parsed.answer}
    if parsed.reasoning:
        message["reasoning_content"] = parsed.reasoning
    check_messages([*row.prompt, message])
    earlier = [{**turn, "train": False} if turn["role"] == "assistant" else dict(turn) for turn in row.prompt]
    return [*earlier, dict(message)]


def whole_messages(row: Row) -> list[Turn]:
    """Return all messages of a row, with the loss mask of each assistant turn that SFT must not train."""
    trains = row.trains or [True] * len(row.messages)
    return [
        dict(turn) if is_trained or turn["role"] != "assistant" else {**turn, "train": False}
        for turn, is_trained in zip(row.messages, trains, strict=True)
    ]


def make_row(row: Row, messages: list[Turn], added: Mapping[str, object]) -> dict[str, object]:
    """Return a row of a file: messages, the columns of the row, and the added ones.

    Raises InputError where a column of the row has the name of another part.
    """
    for name in ("messages", *added):
        if name in row.columns and row.columns[name] is not None and row.columns[name] != added.get(name):
            raise InputError(
                f"{row.where}: the row has a column {name!r}, which the written rows need: rename it by columns, as in "
                f"columns: {{original_{name}: {name}}}"
            )
    kept = {name: value for name, value in row.columns.items() if value is not None}
    return {"messages": messages, **kept, **added}


def write_rows(path: Path, rows: Iterable[Mapping[str, object]]) -> int:
    """Write rows as JSON lines in one move, and return their number."""
    partial, count = path.with_name(f"{path.name}.partial"), 0
    with partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    partial.replace(path)
    return count
