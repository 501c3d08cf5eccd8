"""Read and check the fields of a record, and build the messages and columns that several layouts have in common.

A record is one object as a file or a dataset holds it. A null counts as a missing key, since parquet files and hub
datasets write one for each absent field.
"""

from collections.abc import Mapping
from typing import Any

from rekatrain.data.chat import Message
from rekatrain.data.errors import InputError

Record = Mapping[str, Any]  # Any: a JSON value, not yet checked


def rename_keys(record: Record, columns: Mapping[str, str]) -> Record:
    """Return the record with its keys renamed by `columns`, a mapping from our key to the file's.

    Raises InputError where the file's key is missing, and where a renamed key would overwrite another one.

    >>> rename_keys({"q": "2+2?", "level": 1}, {"prompt": "q"})
    {'level': 1, 'prompt': '2+2?'}
    """
    for ours, theirs in columns.items():
        if theirs not in record:
            raise InputError(f"there is no key {theirs!r} (columns: {ours}); the row has {_list_keys(record)}")
    kept = {key: value for key, value in record.items() if key not in columns.values()}
    for ours, theirs in columns.items():
        if ours in kept:
            raise InputError(
                f"columns makes {theirs!r} the key {ours!r}, but the row has its own {ours!r}: "
                f"give that one a name too, such as original_{ours}: {ours}"
            )
    return kept | {ours: record[theirs] for ours, theirs in columns.items()}


def read_text(record: Record, key: str) -> str:
    """Return the text under `key`. Raise InputError where it is missing, blank or not text."""
    text = record.get(key)
    if not isinstance(text, str):
        raise field_error(record, key, "text")
    if not text.strip():
        raise InputError(f"{key} is empty")
    return text


def read_optional_text(record: Record, key: str) -> str | None:
    """Return the text under `key`, or None where it is missing or blank. Raise InputError where it is not text."""
    text = record.get(key)
    if text is None:
        return None
    if not isinstance(text, str):
        raise field_error(record, key, "text")
    return text if text.strip() else None


def read_texts(record: Record, key: str) -> list[str]:
    """Return the list of texts under `key`, or an empty list where it is missing."""
    texts = record.get(key) or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{key} must be a list of texts, not {texts!r}")
    return texts


def read_turns(
    record: Record, key: str, *, required: tuple[str, ...], optional: tuple[str, ...] = ()
) -> list[dict[str, str]]:
    """Return the turns under `key` without their nulls.

    Raises InputError unless each turn has the required keys, no unknown keys and only text as values.
    """
    turns = record.get(key)
    if not isinstance(turns, list) or not turns:
        raise field_error(record, key, "a list with at least one message")
    checked = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            expected = " and ".join(required)
            raise InputError(f"message {number} must be an object with {expected}, not {_type_name(turn)}")
        present = {name: value for name, value in turn.items() if value is not None}
        # A tool call or a loss weight left out in silence would train something else than the row says.
        unknown = [name for name in present if name not in (*required, *optional)]
        if unknown:
            known = ", ".join(required + optional)
            raise InputError(f"message {number} has the unknown key {unknown[0]!r}; it may have {known}")
        for name in (*required, *optional):
            if (name in required or name in present) and not isinstance(present.get(name), str):
                raise InputError(f"message {number}: {name} must be text, not {_type_name(present.get(name))}")
        checked.append(present)
    return checked


def read_messages(record: Record, key: str) -> list[Message]:
    """Return the messages under `key`: objects with role, content and an optional reasoning_content."""
    turns = read_turns(record, key, required=("role", "content"), optional=("reasoning_content",))
    return [{**turn} for turn in turns]  # type: ignore[typeddict-item]  # keys checked by read_turns


def prompt_messages(record: Record, prompt: str) -> list[Message]:
    """Return `prompt` as a user message, after a system message where the record has `system`."""
    system = read_optional_text(record, "system")
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    return [*messages, {"role": "user", "content": prompt}]


def instruction_messages(record: Record) -> list[Message]:
    """Return `instruction` and optional `input`, joined by a blank line, as `prompt_messages` does."""
    parts = (read_text(record, "instruction"), read_optional_text(record, "input"))
    return prompt_messages(record, "\n\n".join(part for part in parts if part))


def assistant_message(answer: str, reasoning: str | None = None) -> Message:
    """Return an assistant's message, with a reasoning_content where `reasoning` is not empty."""
    if not reasoning:
        return {"role": "assistant", "content": answer}
    return {"role": "assistant", "content": answer, "reasoning_content": reasoning}


def other_columns(record: Record, *used: str) -> dict[str, Any]:
    """Return the columns of a row: all fields of the record except those under the keys `used`."""
    return {key: value for key, value in record.items() if key not in used}


def field_error(record: Record, key: str, expected: str) -> InputError:
    """Return the error for a field that is missing or is not what `expected` describes."""
    if record.get(key) is None:
        keys = _list_keys(record)
        return InputError(f"there is no {key!r}; the row has {keys}: set format or columns to match the file")
    return InputError(f"{key} must be {expected}, not {_type_name(record[key])}")


def _type_name(value: object) -> str:
    name = type(value).__name__
    return {"NoneType": "missing", "list": "a list", "dict": "an object"}.get(name, name)


def _list_keys(record: Record) -> str:
    return ", ".join(record) or "no keys"
