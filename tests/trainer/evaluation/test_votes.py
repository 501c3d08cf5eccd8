"""Majority vote: answers grouped by their values, and its chance against brute force over all draws."""

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekatrain.rewards.scoring import ScoringConfig
from rekatrain.trainer.evaluation.figures import all_figures, figures
from rekatrain.trainer.evaluation.votes import find_answer, find_votes, is_same, majority_rate


@given(
    st.lists(st.sampled_from([None, 0, 1, 2]), min_size=1, max_size=7).flatmap(
        lambda votes: st.tuples(st.just(votes), st.sampled_from([0, 1, 2]), st.integers(1, len(votes)))
    )
)
def test_majority_rate_is_that_of_all_draws(case: tuple[list[int | None], int, int]) -> None:
    votes, right, k = case
    draws = list(itertools.combinations(votes, k))
    chance = 0.0
    for draw in draws:
        counts = Counter(vote for vote in draw if vote is not None)
        most = [vote for vote, count in counts.items() if count == max(counts.values())]
        chance += (right in most) / len(most) if most else 0.0
    assert majority_rate([(vote, float(vote == right)) for vote in votes], k) == pytest.approx(chance / len(draws))


def test_majority_rate_is_exact_for_many_answers() -> None:
    ballot = [(0, 1.0)] * 150 + [(1, 0.0)] * 80 + [(None, 0.0)] * 20 + [(index, 0.0) for index in range(2, 8)]
    assert majority_rate(ballot, 256) == 1.0 and 0.58 < majority_rate(ballot, 1) < 0.59
    assert 0.99 < majority_rate(ballot, 64) < 1.0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("First \\boxed{3}, then \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("0.5", "0.5"),
        ("So 3 x 4 gives the answer: 12", "12"),
        ("Paris.", "Paris."),
        ("", ""),
    ],
)
def test_find_answer_is_what_math_answer_would_read(text: str, expected: str) -> None:
    assert find_answer(text) == expected


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("1/2", "0.5", True),
        ("2, 3", "3, 2", True),
        ("Paris.", "paris", True),
        ("12", "13", False),
        ("Paris", "5", False),
    ],
)
def test_is_same_compares_values_and_words(one: str, other: str, same: bool) -> None:
    assert is_same(one, other) is same and is_same(other, one) is same


def test_votes_go_to_the_first_equal_answer_of_their_group() -> None:
    groups = [
        [" 1/2 <sep>", " 3 <sep>", " <reasoning>\nSo\n</reasoning>\n\n0.5 <sep>", " \\boxed{3} <sep>"],
        [" 3 <sep>", " <reasoning>\nnever closed", " Paris <sep>", " paris. <sep>"],
    ]
    assert find_votes(groups, ScoringConfig(num_workers=1)) == [[0, 1, 0, 1], [0, None, 2, 2]]


def answer(prompt: int, index: int, value: float | None, **others: object) -> dict:
    base = {"prompt_index": prompt, "index": index, "num_tokens": 10, "num_thinking": 4, "finish_reason": "stop"}
    return {**base, "rewards": {"math": value, "style": 0.5}, "source": "a", **others}


def test_figures_of_several_answers_by_hand() -> None:
    votes = [(0, 1.0), (0, 1.0), (2, 0.0), (3, 0.0)], [(0, 0.0), (1, 1.0), (2, 0.0), (2, 0.0)]
    answers = [answer(p, i, value, vote=vote) for p, of in enumerate(votes) for i, (vote, value) in enumerate(of)]
    found = figures(answers, "math")
    assert (found["num_right"], found["num_graded"], found["accuracy"]) == (1, 2, 0.5)
    assert found["avg"]["accuracy"] == pytest.approx(3 / 8)
    assert found["avg_at"] == pytest.approx({1: 0.5, 2: 0.75, 4: 3 / 8})
    assert found["pass_at"] == pytest.approx({1: 3 / 8, 2: (5 / 6 + 1 / 2) / 2, 4: 1.0})
    assert found["maj_at"][1] == pytest.approx(3 / 8) and found["maj_at"][4] == 0.5 == found["maj"]["accuracy"]
    # The first prompt gains 1 - 1/2, the second 0 - 1/4.
    assert found["maj_gain"] == {"mean": pytest.approx(1 / 8), "low": -0.25, "high": 0.5}
    assert found["rewards"]["style"] == {"mean": 0.5, "low": 0.5, "high": 0.5, "num_graded": 8}
    assert found["completions"]["stop_ratio"] == 1 and found["thinking_tokens"] == 4


def test_figures_by_source_and_of_graded_rewards() -> None:
    answers = [answer(0, 0, 1.0), answer(1, 0, 0.0, source="b"), answer(2, 0, 0.25, source="b"), answer(3, 0, None)]
    found = figures(answers, "math")
    assert {name: of["accuracy"] for name, of in found["sources"].items()} == {"a": 1.0, "b": 0.0}
    assert found["sources"]["b"]["rewards"]["math"]["mean"] == 0.125 and found["rewards"]["math"]["num_graded"] == 3
    low, mean, high = (found["rewards"]["math"][key] for key in ("low", "mean", "high"))
    assert low < mean < high and mean == pytest.approx(1.25 / 3)


def test_figures_of_budgets_are_a_curve() -> None:
    answers = [answer(p, 0, float(p < right), reasoning_budget=budget, num_thinking=budget or 9)
               for budget, right in ((0, 1), (4, 2), (None, 3)) for p in range(4)]  # fmt: skip
    found = all_figures(answers, "math")
    assert [(point["reasoning_budget"], point["accuracy"]) for point in found["budgets"]] == [
        (0, 0.25),
        (4, 0.5),
        (None, 0.75),
    ]
    assert found["accuracy"] == 0.75 and "budgets" not in all_figures([answer(0, 0, 1.0)], "math")
