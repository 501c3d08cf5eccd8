"""Layouts of chat data: turn a record into a conversation and the columns for its rewards.

Every layout is a pure function from one record to a Row. `data/README.md` shows an example of each.
"""

import re
from collections.abc import Callable

from rekatrain.data.chat import Message, check_messages, neutralize_messages
from rekatrain.data.errors import InputError
from rekatrain.data.records import (
    Record,
    assistant_message,
    instruction_messages,
    other_columns,
    prompt_messages,
    read_messages,
    read_optional_text,
    read_text,
    read_turns,
)
from rekatrain.data.rows import Row

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
    return Row(messages=read_messages(record, "messages"), columns=other_columns(record, "messages"))


def prompt_answer_row(record: Record) -> Row:
    """Row of `prompt` with optional `answer`, `reasoning` and `system`; the answer is also a column, as text."""
    columns = other_columns(record, "prompt", "answer", "reasoning", "system")
    messages = prompt_messages(record, read_text(record, "prompt"))
    reasoning = read_optional_text(record, "reasoning")
    if record.get("answer") is None:
        if reasoning:
            raise InputError("there is reasoning but no answer: add the answer, or remove the reasoning")
        return Row(messages=messages, columns=columns)
    answer = _number_as_text(record["answer"]) or read_text(record, "answer")
    return Row(messages=[*messages, assistant_message(answer, reasoning)], columns={**columns, "answer": answer})


def sharegpt_row(record: Record) -> Row:
    """Row of `conversations`: a list of {from, value}, where `from` is one of SHAREGPT_ROLES."""
    messages: list[Message] = []
    for number, turn in enumerate(read_turns(record, "conversations", required=("from", "value")), start=1):
        if turn["from"] not in SHAREGPT_ROLES:
            known = ", ".join(SHAREGPT_ROLES)
            raise InputError(f"message {number} is from {turn['from']!r}, which is not one of {known}")
        messages.append({"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]})
    return Row(messages=messages, columns=other_columns(record, "conversations"))


def alpaca_row(record: Record) -> Row:
    """Row of `instruction`, `output` and optional `input` and `system`; a blank line joins instruction and input."""
    return Row(
        messages=[*instruction_messages(record), assistant_message(read_text(record, "output"))],
        columns=other_columns(record, "instruction", "input", "output", "system"),
    )


def gsm8k_row(record: Record) -> Row:
    """Row of `question` and `answer` as GSM8K writes it: a solution, `####` and the final answer.

    >>> gsm8k_row({"question": "48/2?", "answer": "It is <<48/2=24>>24.\\n#### 1,024"}).messages[-1]
    {'role': 'assistant', 'content': '1024', 'reasoning_content': 'It is 24.'}
    """
    solution, mark, final = read_text(record, "answer").rpartition("####")
    answer = _THOUSANDS_COMMA.sub("", final.strip())
    if not mark or not answer:
        raise InputError("answer must end with '####' and the final answer, as in '#### 42'")
    reasoning = _CALCULATOR_ANNOTATION.sub("", solution).strip()
    return Row(
        messages=[{"role": "user", "content": read_text(record, "question")}, assistant_message(answer, reasoning)],
        columns={**other_columns(record, "question", "answer"), "answer": answer},
    )


def reasoning_gym_row(task: str, entry: Record) -> Row:
    """Row of an entry that the reasoning_gym task generated; its columns are the inputs of the task's scorer."""
    messages: list[Message] = [{"role": "user", "content": entry["question"]}]
    if isinstance(entry["answer"], str) and entry["answer"]:  # None in tasks that accept many answers
        messages.append(assistant_message(entry["answer"]))
    columns = {"answer": entry["answer"], "reasoning_gym_task": task, "reasoning_gym_entry": entry}
    return Row(messages=messages, columns=columns)


LAYOUTS: dict[str, Callable[[Record], Row]] = {
    "messages": messages_row,
    "prompt_answer": prompt_answer_row,
    "sharegpt": sharegpt_row,
    "alpaca": alpaca_row,
    "gsm8k": gsm8k_row,
}


def finish_messages(messages: list[Message], *, system: str | None, neutralize: bool) -> list[Message]:
    """Return checked messages, with `system` where they have no system message.

    With `neutralize`, text that would forge a turn is broken by a space; otherwise it raises InputError.
    """
    if system is not None and all(message["role"] != "system" for message in messages):
        messages = [{"role": "system", "content": system}, *messages]
    if neutralize:
        messages = neutralize_messages(messages)
    check_messages(messages)
    for number, message in enumerate(messages, start=1):
        try:
            "".join([message["role"], message["content"], message.get("reasoning_content", "")]).encode()
        except UnicodeEncodeError as error:  # JSON can escape half a surrogate pair, which no tokenizer accepts
            raise InputError(f"message {number} holds half a surrogate pair, which is not text: remove it") from error
    return messages


def _number_as_text(value: object) -> str | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if is_number else None
