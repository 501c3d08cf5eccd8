"""The rules of `generate:`: which completions of a prompt become rows. Pure functions of answers and scores."""

from collections.abc import Collection, Sequence

from rekatrain.data.chat import FinishReason
from rekatrain.trainer.synthesis.config import GenerateConfig
from rekatrain.trainer.synthesis.journal import Answer, Score

# A completion of a prompt: its index, its text and its rewards.
Judged = tuple[int, Answer, Score]


def is_right(score: Score, deciding: Collection[str]) -> bool:
    """Return True if each deciding reward that judges the completion is exactly 1.0, and at least one does.

    >>> is_right(Score(total=1.2, rewards={"math_answer": 1.0, "brevity": 0.2}), ["math_answer"])
    True
    """
    values = [score.rewards.get(name) for name in deciding]
    known = [value for value in values if value is not None]
    return bool(known) and all(value == 1.0 for value in known)


def pass_rate(scores: Sequence[Score], deciding: Collection[str]) -> tuple[float | None, int]:
    """Return the fraction of right completions, and the number that was judged; None where none was."""
    judged = [score for score in scores if any(score.rewards.get(name) is not None for name in deciding)]
    if not judged:
        return None, 0
    return sum(is_right(score, deciding) for score in judged) / len(judged), len(judged)


def choose(group: Sequence[Judged], config: GenerateConfig, deciding: Collection[str]) -> list[Judged]:
    """Return the completions of a prompt that the rule keeps, by falling total reward, equal ones as sampled.

    group: the completions that can be rows: ended, readable, without duplicates
    """
    ordered = sorted(group, key=lambda judged: -_total(judged))
    if config.keep in ("right", "shortest_right"):
        ordered = [judged for judged in ordered if is_right(judged[2], deciding)]
    if config.threshold is not None:
        ordered = [judged for judged in ordered if _total(judged) >= config.threshold]
    if config.keep == "shortest_right":
        ordered = sorted(ordered, key=lambda judged: len(judged[1].text))
    if config.keep in ("best", "shortest_right"):
        ordered = [judged for judged in ordered[:1] if config.keep != "best" or judged[2].total is not None]
    return ordered[: config.max_per_prompt]


def without_duplicates(group: Sequence[Judged]) -> list[Judged]:
    """Return the completions whose text no earlier one has, but for white space."""
    first: dict[str, Judged] = {}
    for judged in group:
        first.setdefault(" ".join(judged[1].text.split()), judged)
    return list(first.values())


def has_ended(answer: Answer) -> bool:
    """Return True unless the completion was cut off."""
    return answer.finish_reason is not FinishReason.LENGTH


def _total(judged: Judged) -> float:
    total = judged[2].total
    return -float("inf") if total is None else total
