"""Rewards: right answers earn full marks, whatever else earns none, and a recipe's mistake is named before it costs."""

import gzip
import json

import pytest
import reasoning_gym

from rekatrain.data.chat import parse_completion, render_completion
from rekatrain.data.errors import InputError
from rekatrain.rewards.code.verifiers import ReasoningGym
from rekatrain.rewards.errors import RewardError
from rekatrain.rewards.scorers.math_answer import math_answer
from rekatrain.rewards.scorers.text import reasoning_format
from tests.conftest import REAL_DATA

MATH_ANSWERS = [
    # text, gold, score
    ("42", "42", 1.0),
    ("42", 42, 1.0),
    ("2.50", 2.5, 1.0),
    ("0.0000001", 1e-7, 1.0),
    ("42.", "42", 1.0),
    ("**42**", "42", 1.0),
    ("(42)", "42", 1.0),
    ("The answer is 42.", "42", 1.0),
    ("The answer is 43.", "42", 0.0),
    ("-5", "-5", 1.0),
    ("−5", "-5", 1.0),
    ("5", "-5", 0.0),
    # boxes: the last one counts, and one that holds several numbers holds no number
    (r"\boxed{42}", "42", 1.0),
    (r"so $\boxed{42}$ and not 7", "42", 1.0),
    (r"\boxed{1} or rather \boxed{42}", "42", 1.0),
    (r"\boxed{42} or rather \boxed{1}", "42", 0.0),
    (r"\boxed{41} \boxed{42} \boxed{43}", "42", 0.0),
    (r"\boxed{41, 42}", "42", 0.0),
    (r"\boxed{41 or 42}", "42", 0.0),
    (r"\boxed{41 and 42}", "42", 0.0),
    (r"\boxed{7} 42", "42", 0.0),
    (r"\boxed{}", "42", 0.0),
    # plain text: the number after the last "answer", else the last number
    ("3 boxes of 14 make 42", "42", 1.0),
    ("42 apples out of 50", "42", 0.0),
    ("16 - 3 - 4 = 9. 9 * 2 = $18", "18", 1.0),
    ("The answer is 42, as 7 * 6 is not 41", "42", 1.0),
    ("The answer is 3. The answer is 42", "42", 1.0),
    ("The answer is 3. No, 42", "42", 0.0),
    # thousands, units, percent
    ("1,000", "1000", 1.0),
    ("1000", "1,000", 1.0),
    (r"\boxed{1{,}000}", "1000", 1.0),
    (r"\boxed{1\,000}", "1000", 1.0),
    ("It costs $1,234.50 in total.", "1234.5", 1.0),
    (r"\$18", "18", 1.0),
    (r"\boxed{\$18.00}", "$18", 1.0),
    ("€18", "18", 1.0),
    ("18 dollars", "18", 1.0),
    (r"\boxed{18 dollars}", "18", 1.0),
    (r"\boxed{60 miles per hour}", "60", 1.0),
    (r"\boxed{10\text{ cm}}", "10 cm", 1.0),
    ("18", "18 dollars", 1.0),
    ("50%", "50", 1.0),
    ("50%", "0.5", 1.0),
    (r"\boxed{50\%}", "50%", 1.0),
    ("5%", "50", 0.0),
    # fractions, powers, formulas
    ("1/2", "0.5", 1.0),
    (r"\frac{1}{2}", "0.5", 1.0),
    (r"\boxed{\frac12}", "1/2", 1.0),
    ("-0.5", "-1/2", 1.0),
    ("0.33", "1/3", 0.0),
    ("2^{10}", "1024", 1.0),
    ("2^{10}", "2", 0.0),
    (r"\boxed{1e3}", "1000", 1.0),
    ("2x", "2", 0.0),
    (r"\boxed{1 + x}", "x+1", 1.0),
    (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", 1.0),
    (r"\boxed{x = 5}", "5", 1.0),
    (r"\boxed{(3, 4)}", "(3,4)", 1.0),
    (r"\boxed{(4, 3)}", "(3,4)", 0.0),
    (r"\boxed{\text{east}}", r"\text{east}", 1.0),
    (r"\boxed{\text{seat}}", r"\text{east}", 0.0),
    ("2 1/2", "2.5", 1.0),
    (r"\boxed{2\frac{1}{2}}", "2.5", 1.0),
    ("3:4", "3/4", 1.0),
    # intervals, sets, several values
    (r"\boxed{[1, 2)}", "[1,2)", 1.0),
    (r"\boxed{[1, 2]}", "[1,2)", 0.0),
    (r"\boxed{(-\infty, 3]}", r"(-\infty,3]", 1.0),
    (r"\boxed{x \in [1, 2)}", "[1,2)", 1.0),
    (r"\boxed{\{1, 2\}}", r"\{2,1\}", 1.0),
    (r"\boxed{3, 2}", "2, 3", 1.0),
    (r"\boxed{2} and \boxed{3}", "2, 3", 1.0),
    (r"\boxed{2} and \boxed{4}", "2, 3", 0.0),
    (r"\boxed{2}", "2, 3", 0.0),
    # more units
    (r"\boxed{90^\circ}", "90", 1.0),
    (r"\boxed{5 \text{ cm}^2}", "5", 1.0),
    (r"\boxed{12 m/s}", "12", 1.0),
    ("42km", "42", 1.0),
    # hedging
    ("The answer is 42 or 43", "42", 0.0),
    ("42 or 43", "42", 0.0),
    ("The answer is 41 or 42", "42", 0.0),
    (r"\boxed{42} \boxed{}", "42", 0.0),
    # nonsense
    ("", "42", 0.0),
    ("forty-two", "42", 0.0),
    (r"\boxed{42", "42", 0.0),
    (r"\boxed{\frac{1}{2}", "0.5", 0.0),
    (r"$\frac{1}{", "42", 0.0),
    (r"\boxed{\frac{1}{0}}", "42", 0.0),
    ("9^9^9^9^9", "42", 0.0),
    ("\x00\ud800", "42", 0.0),
    ("42" * 5_000, "42", 0.0),
    ("word " * 2_000, "42", 0.0),
    ("word " * 2_000 + "42", "42", 1.0),
    (r"\boxed{" * 1_500, "42", 0.0),
    (r"\boxed{" + "(" * 10_000 + "}", "42", 0.0),
    # a gold that is no mathematics cannot be graded
    ("42", None, None),
    ("42", "", None),
    ("42", "forty two", None),
    ("east", "seat", None),
]


@pytest.mark.parametrize(("text", "gold", "score"), MATH_ANSWERS)
def test_math_answer_compares_values(text, gold, score):
    assert math_answer(parse_completion(f" {text} <sep>"), answer=gold) == score


def test_math_answer_ignores_the_reasoning():
    for text in (
        "<reasoning>\n42",
        r"<reasoning>\boxed{42}</reasoning> <sep>",
        "<reasoning>42</reasoning>\n\n43 <sep>",
    ):
        assert math_answer(parse_completion(text), answer="42") == 0.0


def test_math_answer_rejects_a_gold_that_is_no_text_or_number():
    with pytest.raises(InputError, match=r"must be text or a number, not list: \[42\]"):
        math_answer(parse_completion("42"), answer=[42])


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (render_completion("Two and two.", "4"), 1.0),
        ("<reasoning>Two and two.</reasoning>4<|endoftext|>", 1.0),
        ("<reasoning>Two and two.</reasoning>4", 0.0),  # cut off
        ("<reasoning>Two and two.", 0.0),
        ("<reasoning>Two and two. <sep>", 0.0),
        ("4 <sep>", 0.0),
        ("Sure. <reasoning>Two and two.</reasoning> 4 <sep>", 0.0),
        ("<reasoning> </reasoning> 4 <sep>", 0.0),
        ("<reasoning>Two and two.</reasoning> <sep>", 0.0),
        ("<reasoning><reasoning>Two and two.</reasoning> 4 <sep>", 0.0),
        ("<reasoning>Two and two.</reasoning></reasoning> 4 <sep>", 0.0),
        ("<reasoning>Two and two.</reasoning> 4 <reasoning>Or?</reasoning> <sep>", 0.0),
        ("", 0.0),
    ],
)
def test_reasoning_format_wants_one_closed_block_and_an_answer(text, score):
    assert reasoning_format(parse_completion(text)) == score


def test_math_answer_gives_gsm8k_golds_full_marks():
    lines = gzip.decompress((REAL_DATA / "gsm8k_test.jsonl.gz").read_bytes()).splitlines()
    rows = [json.loads(line) for line in lines]
    golds = [row["answer"].rpartition("#### ")[2] for row in rows]
    thoughts = [row["answer"].rpartition("#### ")[0] for row in rows]
    assert len(golds) > 1_000
    for thought, gold in zip(thoughts, golds, strict=True):
        right = parse_completion(render_completion(thought, gold))
        assert (math_answer(right, answer=gold), reasoning_format(right)) == (1.0, 1.0), gold
        wrong = parse_completion(render_completion(thought, str(int(gold.replace(",", "")) + 1)))
        assert math_answer(wrong, answer=gold) == 0.0, gold


@pytest.fixture(scope="module")
def verifiers():
    reward = ReasoningGym()
    yield reward
    reward.close()


@pytest.mark.parametrize(
    "task", ["prime_factorization", "chain_sum", "countdown", "basic_arithmetic", "spell_backward"]
)
def test_reasoning_gym_gives_golds_full_marks_and_no_partial_ones(task, verifiers):
    for entry in reasoning_gym.create_dataset(task, size=5, seed=3):
        gold = entry["answer"]
        for answer, score in [
            (gold, 1.0),
            (f"the answer is maybe {gold} or {gold}7", 0.0),
            ("two × \ud800", 0.0),
            ("", 0.0),
        ]:
            completion = parse_completion(render_completion("Hm.", answer))
            value = verifiers(completion, reasoning_gym_task=task, reasoning_gym_entry=entry)
            assert value == score, answer


def test_reasoning_gym_raises_if_a_verifier_fails_on_its_gold(verifiers):
    with pytest.raises(RewardError, match="ValueError: invalid literal"):
        verifiers(
            parse_completion("2 × x <sep>"),
            reasoning_gym_task="prime_factorization",
            reasoning_gym_entry={"answer": "two", "metadata": {}},
        )
