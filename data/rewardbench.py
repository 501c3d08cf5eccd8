"""Rows of reward-model benchmarks: one prompt with one chosen answer, or several, and one or more rejected answers.

RewardBench (arXiv 2403.13787) has one of each, as text. RewardBench 2 (arXiv 2506.01937) has lists. Each row becomes a
preference for each pair of answers; `subset` stays a column, by which accuracy is reported.
"""

from collections.abc import Iterable, Iterator

from rekatrain.data.files import Located

REJECTED = " rejected "  # in the origin of a pair, before the number of its rejected answer


def read_preferences(records: Iterable[Located]) -> Iterator[Located]:
    """Yield a record with one chosen and one rejected answer for each pair of a row."""
    for where, record in records:
        if not isinstance(record, dict):
            yield where, record
            continue
        chosen, rejected = _answers(record.get("chosen")), _answers(record.get("rejected"))
        if len(chosen) * len(rejected) <= 1:
            yield where, {**record, **{key: answers[0] for key, answers in _sides(chosen, rejected) if answers}}
            continue
        pairs = [(good, bad) for good in chosen for bad in rejected]
        for number, (good, bad) in enumerate(pairs, start=1):
            yield f"{where}{REJECTED}{number}", {**record, "chosen": good, "rejected": bad}


def _sides(chosen: list[object], rejected: list[object]) -> list[tuple[str, list[object]]]:
    return [("chosen", chosen), ("rejected", rejected)]


def _answers(value: object) -> list[object]:
    """Return the texts of a list; messages, text and whatever is wrong are one answer."""
    is_list = isinstance(value, list) and value and all(isinstance(item, str) for item in value)
    return list(value) if is_list and isinstance(value, list) else [value]
