"""Majority vote: answers grouped by mathematical equality, and the chance that the most frequent one is right.

Two answers are equal as `math_answer` reads and compares them; those that it cannot read, as text without case.
"""

from collections.abc import Sequence
from itertools import groupby
from math import comb
from typing import Any

import numpy as np

from rekatrain.data.chat import ParsedCompletion, parse_completion
from rekatrain.rewards.compose import RewardFunction, build_reward_functions
from rekatrain.rewards.grader import Grader
from rekatrain.rewards.scorers import math_prose
from rekatrain.rewards.scorers.boxes import locate_boxes
from rekatrain.rewards.scorers.math_reading import read
from rekatrain.rewards.scorers.math_values import is_equal
from rekatrain.rewards.scoring import ScoringConfig

# An answer has the value at its end: a longer one is cut from the front.
MAX_CHARACTERS = 4000
SCORER = "rekatrain.trainer.evaluation.votes:first_equal"


def first_equal(completion: ParsedCompletion, *, earlier: list[str]) -> float | None:
    """Return the index of the first of the earlier answers that equals the completion's, or their number if none does.

    None if the completion has no answer.
    """
    answer = find_answer(completion.answer)
    if not answer:
        return None
    for index, other in enumerate(earlier):
        if is_same(find_answer(other), answer):
            return float(index)
    return float(len(earlier))


def find_answer(text: str) -> str:
    """Return what is compared: an answer's last box, itself if it is one value, or the value that it ends with.

    >>> find_answer("So it is $\\\\boxed{\\\\frac12}$."), find_answer("The answer is 12 apples."), find_answer("Paris")
    ('\\\\frac12', '12 apples.', 'Paris')
    """
    boxes = locate_boxes(text)
    if boxes:
        return text[boxes[-1][0] : boxes[-1][1]].strip()
    if read(text) is not None:
        return text.strip()
    candidates = math_prose.find_answer(text, None)
    return next((found for found in candidates if read(found) is not None), text).strip()


def is_same(one: str, other: str) -> bool:
    """Return True if two answers have equal values, or the same words."""
    first, second = read(one), read(other)
    if first is None or second is None:
        return one.casefold().strip(" .") == other.casefold().strip(" .")
    return is_equal(first, second) or is_equal(second, first)


def find_votes(groups: Sequence[Sequence[str]], scoring: ScoringConfig) -> list[list[int | None]]:
    """Return for each completion of each group the index of the first equal answer in it: its own if it is the first.

    None for a completion without an answer, which does not vote. Answers are compared in the workers of a grader, with
    their limits, because they are text of a policy; a comparison that fails is a separate vote.
    """
    functions: list[RewardFunction] = build_reward_functions({SCORER: {"weight": 1.0}})
    texts = [text for group in groups for text in group]
    answers = [[parse_completion(text).answer[-MAX_CHARACTERS:] for text in group] for group in groups]
    earlier = [of_group[:index] for of_group in answers for index in range(len(of_group))]
    empty: list[list[int]] = [[] for _ in texts]
    with Grader(functions, scoring) as grader:
        scores = grader.score(
            prompts=["" for _ in texts], completions=texts, completion_ids=empty, columns={"earlier": earlier}
        )
    found = iter(zip(scores.by_name[SCORER], scores.errors, strict=True))
    votes = []
    for group in groups:
        votes.append([_vote(*next(found), index) for index in range(len(group))])
    return votes


def _vote(value: float | None, errors: Any, index: int) -> int | None:
    return index if errors else None if value is None else int(value)


def majority_rate(ballot: Sequence[tuple[int | None, float]], k: int) -> float:
    """Return the chance that the majority of k of the answers, drawn without replacement, is right.

    Of several most frequent answers one is chosen at random; without a vote, the chance is 0. Exact: of all draws,
    those are counted in which an answer comes j times and no other one more often.

    ballot: for each answer its vote, or None, and 1.0 if it is right
    """
    votes = sorted((vote, is_right) for vote, is_right in ballot if vote is not None)
    grouped = [[is_right for _, is_right in group] for _, group in groupby(votes, key=lambda entry: entry[0])]
    counts = [len(group) for group in grouped]
    num_silent = len(ballot) - sum(counts)
    total = comb(len(ballot), k)
    chance = 0.0
    for index, group in enumerate(grouped):
        share = sum(group) / len(group)
        if share:
            others = counts[:index] + counts[index + 1 :]
            chance += share * sum(
                comb(counts[index], j) * _ways(others, num_silent, k - j, j) / total
                for j in range(1, min(counts[index], k) + 1)
            )
    return chance


def _ways(others: Sequence[int], num_silent: int, rest: int, j: int) -> float:
    """Count the draws of `rest` other answers with none more than j times, each divided by 1 + the number of ties."""
    ways = np.zeros((1, rest + 1))  # [ties, answers drawn]
    ways[0, : num_silent + 1] = [comb(num_silent, drawn) for drawn in range(min(num_silent, rest) + 1)]
    for count in others:
        fewer = np.array([float(comb(count, drawn)) for drawn in range(min(count, j - 1, rest) + 1)])
        has_tie = count >= j and rest >= j
        new = np.zeros((len(ways) + has_tie, rest + 1))
        for ties, drawn in enumerate(ways):
            new[ties] += np.convolve(drawn, fewer)[: rest + 1]
            if has_tie:
                new[ties + 1, j:] += drawn[: rest + 1 - j] * comb(count, j)
        ways = new
    return float(sum(of_ties[rest] / (1 + ties) for ties, of_ties in enumerate(ways)))
