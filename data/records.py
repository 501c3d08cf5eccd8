"""Read and check the fields of a record, and build the messages and columns that several layouts have in common.

A record is one object as a file or a dataset holds it. A null counts as a missing key, since parquet files and hub
datasets write one for each absent field.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, cast

from rekatrain.data.chat import Message
from rekatrain.data.errors import InputError

Record = Mapping[str, Any]  # Any: a JSON value, not yet checked

SYSTEM_KEYS = ("system", "system_prompt")
PROMPT_KEYS = (*SYSTEM_KEYS, "history")  # used by `prompt_messages`
WEIGHT_KEYS = ("weight", "sample_weight", "loss_weight")
# Fields by which other tools change the prompt or the loss. A layout that does not use one rejects the row.
SHAPING_KEYS = frozenset(
    (*SYSTEM_KEYS, "history", "tools", "functions", "chat_template_kwargs", *WEIGHT_KEYS, "loss_mask", "weights")
    + ("train_on_inputs",)
    + ("image", "images", "video", "videos", "audio", "audios")
)
# Arguments of reward functions: a column of that name would replace what the policy wrote.
RESERVED_COLUMNS = frozenset(("prompts", "completions", "completion_ids", "trainer_state", "log_metric", "log_extra"))


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


def read_system(record: Record) -> str | None:
    """Return the text under `system` or `system_prompt`, or None. Raise InputError where the two differ."""
    texts = {key: text for key in SYSTEM_KEYS if (text := read_optional_text(record, key))}
    if len(set(texts.values())) > 1:
        raise InputError("the row has both 'system' and 'system_prompt', and they differ: remove one of them")
    return next(iter(texts.values()), None)


def add_system(record: Record, messages: list[Message], tools: str | None = None) -> list[Message]:
    """Return messages with the record's system message, if it has one, and `tools` as a further paragraph of it.

    Raises InputError where the messages have another system message.
    """
    system, first = read_system(record), messages[0]
    own = first["content"] if first["role"] == "system" else None
    if system and own is not None and own != system:
        raise InputError("the row has a system message, and another text under 'system': remove one of them")
    text = own if own is not None else system
    if tools:
        text = f"{text}\n\n{tools}" if text else tools
    if text is None or text == own:
        return messages
    return [{"role": "system", "content": text}, *(messages if own is None else messages[1:])]


def prompt_messages(record: Record, prompt: str) -> list[Message]:
    """Return `prompt` as a user message, after the record's system message and its `history`, if it has them."""
    system = read_system(record)
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    return [*messages, *_read_history(record), {"role": "user", "content": prompt}]


def check_prompt_parts(record: Record, *keys: str) -> None:
    """Raise InputError for a text under one of `keys`, which other tools write into the prompt."""
    for key in keys:
        if record.get(key):
            raise InputError(
                f"the row has {key!r}, which this format would leave out of the prompt: write it into the prompt, "
                f"name it as columns: {{input: {key}}} of format alpaca, or make it a column of another name: "
                f"columns: {{other_{key}: {key}}}"
            )


def instruction_messages(record: Record) -> list[Message]:
    """Return `instruction` and optional `input`, joined by a blank line, as `prompt_messages` does."""
    check_prompt_parts(record, "context")
    parts = (read_text(record, "instruction"), read_optional_text(record, "input"))
    return prompt_messages(record, "\n\n".join(part for part in parts if part))


def assistant_message(answer: str, reasoning: str | None = None) -> Message:
    """Return an assistant's message, with a reasoning_content where `reasoning` is not empty."""
    if not reasoning:
        return {"role": "assistant", "content": answer}
    return {"role": "assistant", "content": answer, "reasoning_content": reasoning}


def number_as_text(value: object) -> str | None:
    """Return a number as text, and None for any other value. Raise InputError for NaN, with which pandas marks gaps."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and not math.isfinite(cast(float, value)):
        raise InputError(f"the answer is {value}, which is no number: write null where a row has no answer")
    return str(value) if is_number else None


def other_columns(record: Record, *used: str) -> dict[str, Any]:
    """Return the columns of a row: all fields of the record except those under the keys `used`.

    Raises InputError for a field that shapes the prompt or the loss and that the layout does not use, and for a column
    with the name of an argument that reward functions receive.
    """
    columns = {key: value for key, value in record.items() if key not in used}
    for key, value in columns.items():
        if key in SHAPING_KEYS and value not in (None, "", "[]", [], {}) and not (key in WEIGHT_KEYS and value == 1):
            raise InputError(
                f"the row has {key!r}, which this format does not use and which shapes the prompt or the loss: "
                f"remove it, or make it a column of another name: columns: {{other_{key}: {key}}}"
            )
        if key in RESERVED_COLUMNS:
            raise InputError(
                f"the row has {key!r}, a name that reward functions receive from the trainer: give the column another "
                f"name: columns: {{other_{key}: {key}}}"
            )
    return columns


def field_error(record: Record, key: str, expected: str) -> InputError:
    """Return the error for a field that is missing or is not what `expected` describes."""
    if key in record and record[key] is None:
        return InputError(f"{key} is null: it must be {expected}")
    if record.get(key) is None:
        keys = _list_keys(record)
        return InputError(f"there is no {key!r}; the row has {keys}: set format or columns to match the file")
    return InputError(f"{key} must be {expected}, not {type_name(record[key])}")


def type_name(value: object) -> str:
    """Return the type of a value as messages name it."""
    name = type(value).__name__
    return {"NoneType": "missing", "list": "a list", "dict": "an object"}.get(name, name)


def _read_history(record: Record) -> list[Message]:
    """Return the earlier turns under `history`: pairs of a question and an answer."""
    history = record.get("history") or []
    if isinstance(history, str):
        try:
            history = json.loads(history)
        except ValueError as error:
            raise InputError("history must be a list of pairs [question, answer], or the JSON text of one") from error
    messages: list[Message] = []
    for pair in history if isinstance(history, list) else [history]:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise InputError(f"history must be a list of pairs [question, answer], not of {pair!r}")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return messages


def _list_keys(record: Record) -> str:
    return ", ".join(record) or "no keys"
