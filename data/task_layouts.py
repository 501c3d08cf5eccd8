"""Layouts of well-known tasks whose rows need more than a rename: programs with tests, word problems, multiple choice.

Each gives, as columns, what the reward of its kind takes: `tests` for code_tests, `answer` for math_answer and
exact_match, `choice` for multiple_choice.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

from rekatrain.data.chat import Message
from rekatrain.data.errors import InputError
from rekatrain.data.layouts import Record
from rekatrain.data.rows import Row

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# A question that speaks of its options cannot be asked without them, nor can an option that speaks of the others.
SPEAKS_OF_OPTIONS = re.compile(
    r"\b(?:which|what) (?:one |ones )?(?:of|among)\b|\bfollowing\b|\b(?:options?|choices?|alternatives?|statements?)\b"
    r"|\b(?:except|best|most likely|least likely|not true|is true|is false|is correct|is incorrect)\b",
    re.IGNORECASE,
)
SPEAKS_OF_OTHERS = re.compile(
    r"\b(?:all|none|both|neither|any|either) (?:of )?(?:the |these |them\b)|\b(?:above|below|cannot be determined)\b"
    r"|\b(?:both|neither|either)\b.*\b[A-Z]\b|^\W*[A-Z]\W*(?:and|or|&)\W*[A-Z]\W*$",
    re.IGNORECASE,
)
MAX_FILL_IN = 40  # characters: a longer answer has too many right wordings to be compared


def mbpp_row(record: Record) -> Row:
    """Row of MBPP: `text`, `code`, `test_list`, and optional `test_setup_code` and `challenge_test_list`.

    The first test is shown in the prompt, as the paper does (arXiv 2108.07732): it gives the function's name.
    """
    asserts = [*_texts(record, "test_list"), *_texts(record, "challenge_test_list")]
    if not asserts:
        raise InputError("test_list is empty: there is nothing to test the code by")
    prompt = f"{_text(record, 'text')}\nYour code should pass this test:\n{asserts[0]}"
    return Row(
        messages=_conversation(prompt, f"```python\n{_text(record, 'code').strip()}\n```"),
        columns={"tests": {"asserts": asserts, "setup": record.get("test_setup_code") or ""}},
    )


def humaneval_row(record: Record) -> Row:
    """Row of HumanEval: `prompt`, `canonical_solution`, `test` and `entry_point`."""
    prompt, entry_point = _text(record, "prompt"), _text(record, "entry_point")
    return Row(
        messages=_conversation(
            f"Complete this function. Answer with the whole of it.\n```python\n{prompt.strip()}\n```",
            f"```python\n{prompt}{_text(record, 'canonical_solution')}```",
        ),
        columns={
            "tests": {
                "asserts": [f"{_text(record, 'test')}\ncheck({entry_point})"],
                "prefix": prompt,
                "entry_point": entry_point,
            }
        },
    )


def svamp_row(record: Record) -> Row:
    """Row of SVAMP: `Body`, `Question` and `Answer`, a number."""
    answer = record.get("Answer")
    if isinstance(answer, bool) or not isinstance(answer, int | float):
        raise InputError(f"Answer must be a number, not {answer!r}")
    text = f"{answer:g}" if float(f"{answer:g}") == answer else str(answer)
    body = _text(record, "Body").strip()
    prompt = f"{body}{'' if body.endswith(('.', '!', '?')) else '.'} {_text(record, 'Question').strip()}"
    return Row(messages=_conversation(prompt, text), columns={"answer": text})


def multiple_choice_row(record: Record) -> Row:
    """Row of `question`, `choices` (texts) and `answer`: the letter of the right one, or its number from 0."""
    question, choices, right = _choices(record)
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    letter = LETTERS[right]
    prompt = "\n".join([question, *lines, "Answer with the letter of the right choice."])
    return Row(messages=_conversation(prompt, letter), columns={"choice": letter, "answer": None})


def fill_in_row(record: Record) -> Row:
    """The same row asked without its choices, where the question and the right choice make sense without them.

    A policy can guess a letter, and be rewarded for it; so Reka turned multiple choice into fill-in for RL. Where the
    row does not allow it, it stays as `multiple_choice` has it. Of the columns `answer` and `choice`, one is None.

    >>> fill_in_row({"question": "What is 6 x 7?", "choices": ["13", "42"], "answer": "B"}).columns
    {'answer': '42', 'choice': None}
    """
    question, choices, right = _choices(record)
    answer = choices[right].strip()
    is_unique = sum(choice.strip().casefold() == answer.casefold() for choice in choices) == 1
    speaks_of_others = any(SPEAKS_OF_OTHERS.search(choice) for choice in choices)
    if len(answer) > MAX_FILL_IN or not is_unique or speaks_of_others or SPEAKS_OF_OPTIONS.search(question):
        return multiple_choice_row(record)
    return Row(messages=_conversation(question, answer), columns={"answer": answer, "choice": None})


TASK_LAYOUTS: dict[str, Callable[[Record], Row]] = {
    "mbpp": mbpp_row,
    "humaneval": humaneval_row,
    "svamp": svamp_row,
    "multiple_choice": multiple_choice_row,
    "fill_in": fill_in_row,
}


def _choices(record: Record) -> tuple[str, Sequence[str], int]:
    choices = _texts(record, "choices")
    if not 2 <= len(choices) <= len(LETTERS):
        raise InputError(f"choices must be 2 to {len(LETTERS)} texts, not {len(choices)}")
    answer = record.get("answer")
    letter = answer.strip(" ().").upper() if isinstance(answer, str) else ""
    right = LETTERS.index(letter) if letter and letter in list(LETTERS) else -1
    if isinstance(answer, int) and not isinstance(answer, bool):
        right = answer
    if not 0 <= right < len(choices):
        raise InputError(
            f"answer must be the letter of one of the {len(choices)} choices, or its number from 0, not {answer!r}"
        )
    return _text(record, "question").strip(), choices, right


def _conversation(prompt: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _text(record: Record, key: str) -> str:
    text = record.get(key)
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{key} must be a text that is not empty, not {text!r}; the row has {', '.join(record)}")
    return text


def _texts(record: Record, key: str) -> list[Any]:
    """The list of texts under `key`; an empty one where it is missing."""
    texts = record.get(key) or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{key} must be a list of texts, not {texts!r}")
    return texts
