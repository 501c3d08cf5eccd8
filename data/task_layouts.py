"""Layouts of well-known tasks that need more than renamed keys: code with tests, word problems, multiple choice.

Each returns a Row whose columns are the inputs of a reward: `tests` for code_tests, `answer` for math_answer and
exact_match, `choice` for multiple_choice.
"""

import re
from collections.abc import Callable, Sequence

from rekatrain.data.chat import Message
from rekatrain.data.errors import InputError
from rekatrain.data.records import Record, assistant_message, other_columns, read_text, read_texts
from rekatrain.data.rows import Row

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# fill_in needs a question that makes sense without its choices, and choices that do not refer to each other.
REFERS_TO_CHOICES = re.compile(
    r"\b(?:which|what) (?:one |ones )?(?:of|among)\b|\bfollowing\b|\b(?:options?|choices?|alternatives?|statements?)\b"
    r"|\b(?:except|best|most likely|least likely|not true|is true|is false|is correct|is incorrect)\b",
    re.IGNORECASE,
)
REFERS_TO_OTHERS = re.compile(
    r"\b(?:all|none|both|neither|any|either) (?:of )?(?:the |these |them\b)|\b(?:above|below|cannot be determined)\b"
    r"|\b(?:both|neither|either)\b.*\b[A-Z]\b|^\W*[A-Z]\W*(?:and|or|&)\W*[A-Z]\W*$",
    re.IGNORECASE,
)
CHOICE_KEYS = ("question", "choices", "answer")
MAX_FILL_IN = 40  # characters; a longer answer has too many correct wordings to compare with


def mbpp_row(record: Record) -> Row:
    """Row of MBPP: `text`, `code`, `test_list`, and optional `test_setup_code`, `test_imports`, `challenge_test_list`.

    The prompt shows the first test, as in the paper (arXiv 2108.07732), because it gives the function's name.
    """
    asserts = [*read_texts(record, "test_list"), *read_texts(record, "challenge_test_list")]
    if not asserts:
        raise InputError("test_list is empty: add at least one test")
    setup = [record.get("test_setup_code") or "", *read_texts(record, "test_imports")]
    used = ("text", "code", "test_list", "test_setup_code", "test_imports", "challenge_test_list")
    prompt = f"{read_text(record, 'text')}\nYour code should pass this test:\n{asserts[0]}"
    return Row(
        messages=_conversation(prompt, f"```python\n{read_text(record, 'code').strip()}\n```"),
        columns={
            **other_columns(record, *used),
            "tests": {"asserts": asserts, "setup": "\n".join(line for line in setup if line)},
        },
    )


def humaneval_row(record: Record) -> Row:
    """Row of HumanEval: `prompt`, `canonical_solution`, `test` and `entry_point`."""
    prompt, entry_point = read_text(record, "prompt"), read_text(record, "entry_point")
    return Row(
        messages=_conversation(
            f"Complete this function. Answer with the whole of it.\n```python\n{prompt.strip()}\n```",
            f"```python\n{prompt}{read_text(record, 'canonical_solution')}```",
        ),
        columns={
            **other_columns(record, "prompt", "canonical_solution", "test", "entry_point"),
            "tests": {
                "asserts": [f"{read_text(record, 'test')}\ncheck({entry_point})"],
                "prefix": prompt,
                "entry_point": entry_point,
            },
        },
    )


def svamp_row(record: Record) -> Row:
    """Row of SVAMP: `Body`, `Question` and `Answer`, a number."""
    answer = record.get("Answer")
    if isinstance(answer, bool) or not isinstance(answer, int | float):
        raise InputError(f"Answer must be a number, not {answer!r}")
    text = f"{answer:g}" if float(f"{answer:g}") == answer else str(answer)
    body = read_text(record, "Body").strip()
    prompt = f"{body}{'' if body.endswith(('.', '!', '?')) else '.'} {read_text(record, 'Question').strip()}"
    columns = other_columns(record, "Body", "Question", "Answer")
    return Row(messages=_conversation(prompt, text), columns={**columns, "answer": text})


def multiple_choice_row(record: Record) -> Row:
    """Row of `question`, `choices` (texts) and `answer`: the letter of the correct choice, or its index from 0."""
    question, choices, index = _choices(record)
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    letter = LETTERS[index]
    prompt = "\n".join([question, *lines, "Answer with the letter of the right choice."])
    columns = other_columns(record, *CHOICE_KEYS)
    return Row(messages=_conversation(prompt, letter), columns={**columns, "choice": letter, "answer": None})


def fill_in_row(record: Record) -> Row:
    """Row of multiple choice without its choices, where the question and the answer make sense without them.

    A policy can earn a reward by guessing a letter, so Reka turned multiple choice into fill-in for RL. A row that does
    not allow it is laid out as by `multiple_choice_row`. Of the columns `answer` and `choice`, one is None.

    >>> fill_in_row({"question": "What is 6 x 7?", "choices": ["13", "42"], "answer": "B"}).columns
    {'answer': '42', 'choice': None}
    """
    question, choices, index = _choices(record)
    answer = choices[index].strip()
    is_unique = sum(choice.strip().casefold() == answer.casefold() for choice in choices) == 1
    refers_to_others = any(REFERS_TO_OTHERS.search(choice) for choice in choices)
    if len(answer) > MAX_FILL_IN or not is_unique or refers_to_others or REFERS_TO_CHOICES.search(question):
        return multiple_choice_row(record)
    columns = other_columns(record, *CHOICE_KEYS)
    return Row(messages=_conversation(question, answer), columns={**columns, "answer": answer, "choice": None})


TASK_LAYOUTS: dict[str, Callable[[Record], Row]] = {
    "mbpp": mbpp_row,
    "humaneval": humaneval_row,
    "svamp": svamp_row,
    "multiple_choice": multiple_choice_row,
    "fill_in": fill_in_row,
}


def _choices(record: Record) -> tuple[str, Sequence[str], int]:
    """Return the question, its choices and the index of the correct one."""
    choices = read_texts(record, "choices")
    if not 2 <= len(choices) <= len(LETTERS):
        raise InputError(f"choices must be 2 to {len(LETTERS)} texts, not {len(choices)}")
    answer = record.get("answer")
    letter = answer.strip(" ().").upper() if isinstance(answer, str) else ""
    index = LETTERS.index(letter) if letter and letter in list(LETTERS) else -1
    if isinstance(answer, int) and not isinstance(answer, bool):
        index = answer
    if not 0 <= index < len(choices):
        raise InputError(
            f"answer must be the letter of one of the {len(choices)} choices, or its index from 0, not {answer!r}"
        )
    return read_text(record, "question").strip(), choices, index


def _conversation(prompt: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": prompt}, assistant_message(answer)]
