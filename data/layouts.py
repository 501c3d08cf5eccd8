"""Layouts of chat data: turn a record into a conversation and the columns for its rewards.

Every layout is a pure function from one record to a Row. `data/README.md` shows an example of each.
"""

import re
from collections.abc import Callable

from rekatrain.data.chat import Message
from rekatrain.data.errors import InputError
from rekatrain.data.prime import columns_of_tests
from rekatrain.data.records import (
    PROMPT_KEYS,
    SYSTEM_KEYS,
    Record,
    add_system,
    assistant_message,
    instruction_messages,
    number_as_text,
    other_columns,
    prompt_messages,
    read_optional_text,
    read_text,
)
from rekatrain.data.rows import Row
from rekatrain.data.tool_text import TOOL_LISTS, tool_definitions
from rekatrain.data.turns import DEFAULT, TurnOptions, read_prompt, read_turns

_CALCULATOR_ANNOTATION = re.compile(r"<<[^<>]*>>")
_THOUSANDS_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def messages_row(record: Record, options: TurnOptions = DEFAULT) -> Row:
    """Row of `messages`: a list of {role, content} and, for an assistant, an optional reasoning_content."""
    return _conversation_row(record, "messages", options)


def sharegpt_row(record: Record, options: TurnOptions = DEFAULT) -> Row:
    """Row of `conversations`: a list of {from, value}."""
    return _conversation_row(record, "conversations", options)


def prompt_answer_row(record: Record, options: TurnOptions = DEFAULT) -> Row:
    """Row of `prompt` with optional `answer`, `reasoning`, `system` and `history`.

    The answer is also a column, as text. A list of answers is a column of texts, and the first one is the reference.
    Tests of code in `answer`, as older rows of PRIME have them, become the column `tests`.
    """
    columns = other_columns(record, "prompt", "answer", "reasoning", *PROMPT_KEYS)
    messages, trains = read_prompt(record, options)
    reasoning, answer = read_optional_text(record, "reasoning"), record.get("answer")
    if answer is not None and not isinstance(answer, list):
        of_tests = columns_of_tests(record, answer)
        columns |= of_tests
        if "answer" in of_tests:
            return Row(messages=messages, trains=trains, columns=columns)
    if answer is None:
        if reasoning:
            raise InputError("there is reasoning but no answer: add the answer, or remove the reasoning")
        return Row(messages=messages, trains=trains, columns=columns)
    answers = answer if isinstance(answer, list) and answer else [answer]
    texts = [number_as_text(one) or read_text({"answer": one}, "answer") for one in answers]
    return Row(
        messages=[*messages, assistant_message(texts[0], reasoning)],
        trains=[*trains, True],
        columns={**columns, "answer": texts if isinstance(answer, list) else texts[0]},
    )


def alpaca_row(record: Record) -> Row:
    """Row of `instruction`, `output` and optional `input`, `reasoning`, `system` and `history`.

    A blank line joins instruction and input.
    """
    answer = assistant_message(read_text(record, "output"), read_optional_text(record, "reasoning"))
    return Row(
        messages=[*instruction_messages(record), answer],
        columns=other_columns(record, "instruction", "input", "output", "reasoning", *PROMPT_KEYS),
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
        messages=[*prompt_messages(record, read_text(record, "question")), assistant_message(answer, reasoning)],
        columns={**other_columns(record, "question", "answer", *PROMPT_KEYS), "answer": answer},
    )


def reasoning_gym_row(task: str, entry: Record) -> Row:
    """Row of an entry that the reasoning_gym task generated; its columns are the inputs of the task's scorer."""
    messages: list[Message] = [{"role": "user", "content": entry["question"]}]
    if isinstance(entry["answer"], str) and entry["answer"]:  # None in tasks that accept many answers
        messages.append(assistant_message(entry["answer"]))
    columns = {"answer": entry["answer"], "reasoning_gym_task": task, "reasoning_gym_entry": entry}
    return Row(messages=messages, columns=columns)


# Layouts with turns take the options of turns, too.
LAYOUTS: dict[str, Callable[[Record], Row]] = {"alpaca": alpaca_row, "gsm8k": gsm8k_row}
TURN_LAYOUTS: dict[str, Callable[[Record, TurnOptions], Row]] = {
    "messages": messages_row,
    "sharegpt": sharegpt_row,
    "prompt_answer": prompt_answer_row,
}


def _conversation_row(record: Record, key: str, options: TurnOptions) -> Row:
    turns = read_turns(record, key, options)
    messages = add_system(record, turns.messages, tool_definitions(record, options.tool_turns))
    return Row(
        messages=messages,
        # A system message put in front is not trained.
        trains=turns.trains and [*[False] * (len(messages) - len(turns.messages)), *turns.trains],
        columns=other_columns(record, key, *SYSTEM_KEYS, *TOOL_LISTS),
    )
