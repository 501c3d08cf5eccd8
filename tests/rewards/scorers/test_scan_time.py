"""No scorer's time grows with the square of a completion's length, whatever a policy repeats in it."""

import random
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rekatrain.data.chat import FinishReason, ParsedCompletion
from rekatrain.rewards.code.code_tests import extract_code
from rekatrain.rewards.scorers.answers import JsonSchema, Regex, exact_match, multiple_choice, numeric_close
from rekatrain.rewards.scorers.instructions import CHECKS, InstructionFollowing, is_followed
from rekatrain.rewards.scorers.math_answer import math_answer
from rekatrain.rewards.scorers.text import Language, reasoning_format, repetition
from tests.rewards.scorers.test_scorers import INSTRUCTIONS

# Whatever opens, closes, separates or starts something in a scorer's patterns.
TOKENS = [
    r"\boxed{", r"\boxed{42} ", "}", "{", "[", "]", "(", ")", "<<", "*", "**", "* a\n", "\n", "\r\n", " ", "- ", "Dr. ",
    "e.g. ", "P. ", "1. ", ".", ".)", "?!", "answer is ", "the answer: ", "1", "1 ", "1,", ".5 ", "1 or ", "1, ", "-",
    "1+", "1/", "$", "$1", "$$", r"\(", r"\[", "\\", r"\frac", r"\text{a} ", "```", "```python\n", "```json\n", "`",
    '"', "[a]", "option ", "(A) ", "####", "June ", "5:00 ", "%", "1 = ", "x<", "!", "http://a ",
    "<reasoning>", "\ud800",
]  # fmt: skip
LENGTH = 20_000
SECONDS = 0.3  # of processor time; what was quadratic here took 1 to 4


def hostile_texts() -> Iterator[str]:
    rng = random.Random(0)
    for token in TOKENS:
        yield token * (LENGTH // len(token))
    for _ in range(8):
        unit = "".join(rng.choices(TOKENS, k=3))
        yield unit * (LENGTH // len(unit))
        yield "".join(token * (LENGTH // 2 // len(token)) for token in rng.choices(TOKENS, k=2))


def scorers() -> Iterator[tuple[str, Callable[[ParsedCompletion], object]]]:
    golds = {"number": "42", "list": "2, 3", "text": r"\text{east}", "time": "5:00 PM", "interval": "[0,1)"}
    for kind, gold in golds.items():
        yield f"math_answer, {kind}", lambda completion, gold=gold: math_answer(completion, answer=gold)
    yield "exact_match", lambda completion: exact_match(completion, answer="Paris")
    yield "numeric_close", lambda completion: numeric_close(completion, answer="5")
    yield "multiple_choice", lambda completion: multiple_choice(completion, choice="B")
    yield "json_schema", JsonSchema(schema={"type": "object"}, text_around=True)
    yield "regex", Regex(pattern=r"^\d+$")
    yield "extract_code", lambda completion: extract_code(completion.answer)
    yield "reasoning_format", reasoning_format
    yield "repetition", repetition
    language = Language()
    language.setup()
    yield "language", language
    InstructionFollowing().setup()
    for name, options, *_ in INSTRUCTIONS:
        yield name, lambda completion, name=name, options=options: is_followed(name, options, completion.answer)


class TooSlow(Exception):
    """A scorer reached the limit."""


@pytest.fixture
def alarm() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooSlow

    before = signal.signal(signal.SIGVTALRM, stop)
    yield
    signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    signal.signal(signal.SIGVTALRM, before)


@pytest.mark.usefixtures("alarm")
def test_scorers_read_hostile_texts_in_linear_time() -> None:
    assert {name for name, _ in scorers()} >= set(CHECKS)
    slow = []
    for name, scorer in scorers():
        for text in [r"\boxed{42}", "answer is .5", *hostile_texts()]:
            completion = ParsedCompletion(reasoning="Hm.", answer=text, finish_reason=FinishReason.STOP)
            if len(text) < 20:  # the first calls import SymPy and compile patterns: not measured
                scorer(completion)
                continue
            started = time.process_time()
            try:
                signal.setitimer(signal.ITIMER_VIRTUAL, 2 * SECONDS)
                scorer(completion)
                signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            except TooSlow:
                pass
            if time.process_time() - started > SECONDS:
                slow.append((name, text[:20]))
    assert not slow
