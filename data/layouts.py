"""Row layouts: how an object read from a file becomes a conversation and its reward columns.

Every layout is a pure function from one object to a Row. A null counts as a missing key, since parquet files and hub
datasets write one for each absent field. `data/README.md` shows an example of each.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from rekatrain.data.chat import Message, check_messages, neutralize_messages
from rekatrain.data.errors import InputError
from rekatrain.data.rows import Row

Record = Mapping[str, Any]  # Any: a JSON value, not yet checked

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
}
_CALCULATOR_ANNOTATION = re.compile(r"<<[^<>]*>>")
_THOUSANDS_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def messages_row(record: Record) -> Row:
    """Row of `messages`: a list of {role, content} and, for an assistant, an optional reasoning_content."""
    turns = _turns(record, "messages", required=("role", "content"), optional=("reasoning_content",))
    messages: list[Message] = [{**turn} for turn in turns]  # type: ignore[typeddict-item]  # keys checked by _turns
    return Row(messages=messages, columns=_others(record, "messages"))


def prompt_answer_row(record: Record) -> Row:
    """Row of `prompt` with optional `answer`, `reasoning` and `system`; the answer is also a column, as text."""
    columns = _others(record, "prompt", "answer", "reasoning", "system")
    messages = _question(record, _text(record, "prompt"))
    reasoning = _optional_text(record, "reasoning")
    if record.get("answer") is None:
        if reasoning:
            raise InputError("there is a reasoning but no answer; add the answer, or leave the reasoning out")
        return Row(messages=messages, columns=columns)
    answer = _text_of_number(record["answer"]) or _text(record, "answer")
    return Row(messages=[*messages, _assistant(answer, reasoning)], columns={**columns, "answer": answer})


def sharegpt_row(record: Record) -> Row:
    """Row of `conversations`: a list of {from, value}, `from` being one of SHAREGPT_ROLES."""
    messages: list[Message] = []
    for number, turn in enumerate(_turns(record, "conversations", required=("from", "value")), start=1):
        if turn["from"] not in SHAREGPT_ROLES:
            known = ", ".join(SHAREGPT_ROLES)
            raise InputError(f"message {number} is from {turn['from']!r}, which is not one of {known}")
        messages.append({"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]})
    return Row(messages=messages, columns=_others(record, "conversations"))


def alpaca_row(record: Record) -> Row:
    """Row of `instruction`, `output` and optional `input` and `system`; a blank line joins instruction and input."""
    parts = (_text(record, "instruction"), _optional_text(record, "input"))
    messages = _question(record, "\n\n".join(part for part in parts if part))
    return Row(
        messages=[*messages, _assistant(_text(record, "output"), reasoning=None)],
        columns=_others(record, "instruction", "input", "output", "system"),
    )


def gsm8k_row(record: Record) -> Row:
    """Row of `question` and `answer` as GSM8K writes it: a solution, `####` and the final answer.

    >>> gsm8k_row({"question": "48/2?", "answer": "It is <<48/2=24>>24.\\n#### 1,024"}).messages[-1]
    {'role': 'assistant', 'content': '1024', 'reasoning_content': 'It is 24.'}
    """
    solution, mark, final = _text(record, "answer").rpartition("####")
    answer = _THOUSANDS_COMMA.sub("", final.strip())
    if not mark or not answer:
        raise InputError("answer must end with '####' and the final answer, as in '#### 42'")
    reasoning = _CALCULATOR_ANNOTATION.sub("", solution).strip()
    return Row(
        messages=[{"role": "user", "content": _text(record, "question")}, _assistant(answer, reasoning)],
        columns={**_others(record, "question", "answer"), "answer": answer},
    )


def reasoning_gym_row(task: str, entry: Record) -> Row:
    """Row of an entry that the reasoning_gym task made; the columns carry what the task's scorer needs."""
    messages: list[Message] = [{"role": "user", "content": entry["question"]}]
    if isinstance(entry["answer"], str) and entry["answer"]:  # some tasks accept many answers and give None
        messages.append(_assistant(entry["answer"], reasoning=None))
    columns = {"answer": entry["answer"], "reasoning_gym_task": task, "reasoning_gym_entry": entry}
    return Row(messages=messages, columns=columns)


LAYOUTS: dict[str, Callable[[Record], Row]] = {
    "messages": messages_row,
    "prompt_answer": prompt_answer_row,
    "sharegpt": sharegpt_row,
    "alpaca": alpaca_row,
    "gsm8k": gsm8k_row,
}


def rename_keys(record: Record, columns: Mapping[str, str]) -> Record:
    """The object with its keys renamed by `columns`, a mapping from our key to the file's; nothing is overwritten.

    >>> rename_keys({"q": "2+2?", "level": 1}, {"prompt": "q"})
    {'level': 1, 'prompt': '2+2?'}
    """
    for ours, theirs in columns.items():
        if theirs not in record:
            raise InputError(f"there is no key {theirs!r} (columns: {ours}); the row has {_keys(record)}")
    kept = {key: value for key, value in record.items() if key not in columns.values()}
    for ours, theirs in columns.items():
        if ours in kept:
            raise InputError(
                f"columns makes {theirs!r} the key {ours!r}, but the row has its own {ours!r}: "
                f"give that one a name too, such as original_{ours}: {ours}"
            )
    return kept | {ours: record[theirs] for ours, theirs in columns.items()}


def finish_messages(messages: list[Message], *, system: str | None, neutralize: bool) -> list[Message]:
    """The messages with `system` where they have no system message, made harmless if asked for, and checked."""
    if system is not None and all(message["role"] != "system" for message in messages):
        messages = [{"role": "system", "content": system}, *messages]
    if neutralize:
        messages = neutralize_messages(messages)
    check_messages(messages)
    for number, message in enumerate(messages, start=1):
        try:
            "".join([message["role"], message["content"], message.get("reasoning_content", "")]).encode()
        except UnicodeEncodeError as error:  # JSON can escape half a surrogate pair, which no tokenizer takes
            raise InputError(f"message {number} holds half a surrogate pair, which is not text: remove it") from error
    return messages


def _turns(
    record: Record, key: str, *, required: tuple[str, ...], optional: tuple[str, ...] = ()
) -> list[dict[str, str]]:
    """The turns under `key`, without their nulls; each has the required keys, no unknown ones, and only text values."""
    turns = record.get(key)
    if not isinstance(turns, list) or not turns:
        raise _missing_or_mistyped(record, key, "a list with at least one message")
    checked = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict):
            raise InputError(f"message {number} must be an object with {' and '.join(required)}, not {_kind(turn)}")
        given = {name: value for name, value in turn.items() if value is not None}
        # A tool call or a loss weight left out in silence would train something else than the row says.
        unknown = [name for name in given if name not in (*required, *optional)]
        if unknown:
            known = ", ".join(required + optional)
            raise InputError(f"message {number} has the unknown key {unknown[0]!r}; it may have {known}")
        for name in (*required, *optional):
            if (name in required or name in given) and not isinstance(given.get(name), str):
                raise InputError(f"message {number}: {name} must be text, not {_kind(given.get(name))}")
        checked.append(given)
    return checked


def _question(record: Record, question: str) -> list[Message]:
    system = _optional_text(record, "system")
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    return [*messages, {"role": "user", "content": question}]


def _assistant(answer: str, reasoning: str | None) -> Message:
    if not reasoning:
        return {"role": "assistant", "content": answer}
    return {"role": "assistant", "content": answer, "reasoning_content": reasoning}


def _text(record: Record, key: str) -> str:
    text = record.get(key)
    if not isinstance(text, str):
        raise _missing_or_mistyped(record, key, "text")
    if not text.strip():
        raise InputError(f"{key} is empty")
    return text


def _optional_text(record: Record, key: str) -> str | None:
    """The text under `key`; None where it is missing or blank."""
    text = record.get(key)
    if text is None:
        return None
    if not isinstance(text, str):
        raise _missing_or_mistyped(record, key, "text")
    return text if text.strip() else None


def _text_of_number(value: object) -> str | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number else None


def _others(record: Record, *used: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in used}


def _missing_or_mistyped(record: Record, key: str, wanted: str) -> InputError:
    if record.get(key) is None:
        return InputError(f"there is no {key!r}; the row has {_keys(record)}: set format or columns to match the file")
    return InputError(f"{key} must be {wanted}, not {_kind(record[key])}")


def _kind(value: object) -> str:
    kind = type(value).__name__
    return {"NoneType": "missing", "list": "a list", "dict": "an object"}.get(kind, kind)


def _keys(record: Record) -> str:
    return ", ".join(record) or "no keys"
