"""`rekatrain compare A B`: the paired difference of two evaluations of the same prompts, and the rows that changed.

    rekatrain compare sft.json rloo.json

A and B are files of `rekatrain evaluate --out`. Differences are B minus A, over the prompts that both have answered.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from rekatrain.data.errors import InputError
from rekatrain.trainer.intervals import bootstrap_interval

# Rows that changed and are printed, in each direction; --out has all.
MAX_ROWS = 10
MAX_CHARACTERS = 60

Answers = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The paired difference of the means of one reward, B minus A, with its 95 % interval by bootstrap over prompts."""

    mean_a: float
    mean_b: float
    difference: float
    low: float
    high: float
    num_prompts: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two evaluations of the same prompts.

    reward:       the deciding reward
    accuracy:     difference of the accuracy of the first answers
    rewards:      difference of each reward that both have, over all answers
    only_a, only_b: prompts whose first answer is right in A alone, and in B alone
    p_value:      of McNemar's exact test of these two numbers; None if the reward is not 1.0 or 0.0 for each answer
    num_unpaired: prompts that only one of the files has, or whose answers only one of them graded
    changed:      rows whose first answer became right or wrong: row, prompt, gold, a and b (completions), direction
    """

    reward: str
    accuracy: Difference
    rewards: dict[str, Difference]
    only_a: int
    only_b: int
    p_value: float | None
    num_unpaired: int
    changed: list[dict[str, Any]]


def compare(a: Path, b: Path, *, reward: str | None = None, out: Path | None = None) -> Comparison:
    """Compare two files, print the result, and return it.

    reward: the deciding reward; None: that of file A
    out:    a JSON file for the result and all rows that changed
    """
    files = [_read(path) for path in (a, b)]
    deciding = reward or str(files[0].get("evaluate", {}).get("reward", "math_answer"))
    result = compare_answers(*(_groups(file) for file in files), reward=deciding)
    for line in _lines(str(a), str(b), result):
        print(line)
    if out is not None:
        text = json.dumps({"a": str(a), "b": str(b), **asdict(result)}, ensure_ascii=False, indent=1)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(text.encode(errors="backslashreplace") + b"\n")
    return result


def compare_answers(a: Mapping[Any, Answers], b: Mapping[Any, Answers], *, reward: str) -> Comparison:
    """Compare the answers to each prompt, which is named by the same key in both."""
    keys = [key for key in a if key in b]
    if not keys:
        raise InputError("the two evaluations have no prompt in common: evaluate both on the same eval_dataset")
    for name, answers in (("A", a), ("B", b)):
        if not any(reward in answer["rewards"] for key in keys for answer in answers[key]):
            raise InputError(f"evaluation {name} has no reward {reward!r}: choose one that both have with --reward")
    firsts = {key: tuple(side[key][0]["rewards"].get(reward) for side in (a, b)) for key in keys}
    paired = {key: pair for key, pair in firsts.items() if None not in pair}
    if not paired:
        raise InputError(f"no prompt has a first answer that {reward} grades in both evaluations")
    right = {key: (pair[0] == 1.0, pair[1] == 1.0) for key, pair in paired.items()}
    is_binary = all(value in (0.0, 1.0) for pair in paired.values() for value in pair)
    only_a, only_b = (sum(of == pair for of in right.values()) for pair in ((True, False), (False, True)))
    names = [name for name in dict.fromkeys(n for key in keys for answer in a[key] for n in answer["rewards"])]
    rewards = {name: _mean_difference([a[key] for key in keys], [b[key] for key in keys], name) for name in names}
    return Comparison(
        reward=reward,
        accuracy=paired_difference([(float(one), float(other)) for one, other in right.values()]),
        rewards={name: difference for name, difference in rewards.items() if difference is not None},
        only_a=only_a,
        only_b=only_b,
        p_value=mcnemar_exact(only_a, only_b) if is_binary else None,
        num_unpaired=len({*a, *b}) - len(paired),
        changed=[
            {
                "row": a[key][0].get("row"),
                "prompt": a[key][0].get("prompt"),
                "gold": a[key][0].get("gold"),
                "a": a[key][0].get("completion"),
                "b": b[key][0].get("completion"),
                "direction": "right in B alone" if is_right_in_b else "right in A alone",
            }
            for key, (is_right_in_a, is_right_in_b) in right.items()
            if is_right_in_a != is_right_in_b
        ],
    )


def paired_difference(pairs: Sequence[tuple[float, float]]) -> Difference:
    """Return the mean difference of pairs, second minus first, with its interval."""
    differences = [second - first for first, second in pairs]
    low, high = bootstrap_interval(differences)
    mean_a, mean_b = (fmean(values) for values in zip(*pairs, strict=True))
    return Difference(
        mean_a=mean_a, mean_b=mean_b, difference=fmean(differences), low=low, high=high, num_prompts=len(pairs)
    )


def mcnemar_exact(only_a: int, only_b: int) -> float:
    """Return the two-sided p-value of McNemar's exact test: both directions of a change are equally likely.

    >>> mcnemar_exact(0, 5)
    0.0625
    """
    total, fewer = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(total, count) for count in range(fewer + 1))
    return min(1.0, 2 * tail / 2**total)


def _mean_difference(a: Sequence[Answers], b: Sequence[Answers], name: str) -> Difference | None:
    pairs = [(_mean(one, name), _mean(other, name)) for one, other in zip(a, b, strict=True)]
    known = [(first, second) for first, second in pairs if first is not None and second is not None]
    return paired_difference(known) if known else None


def _mean(answers: Answers, name: str) -> float | None:
    values = [answer["rewards"][name] for answer in answers if answer["rewards"].get(name) is not None]
    return fmean(values) if values else None


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"no file at {str(path)!r}: give two files of rekatrain evaluate --out") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{str(path)!r} cannot be read as JSON: {error}") from error
    answers = content.get("answers") if isinstance(content, dict) else None
    if not isinstance(answers, list) or not all(
        isinstance(answer, dict) and isinstance(answer.get("rewards"), dict) and "prompt" in answer
        for answer in answers
    ):
        raise InputError(f"{str(path)!r} is no file of rekatrain evaluate --out: it has no graded answers")
    result: Mapping[str, Any] = content
    return result


def _groups(file: Mapping[str, Any]) -> dict[Any, list[Mapping[str, Any]]]:
    """Return the answers of the file's last reasoning budget by prompt; equal prompts differ by their order."""
    answers = file["answers"]
    last = answers[-1].get("reasoning_budget") if answers else None
    by_row: dict[Any, list[Mapping[str, Any]]] = {}
    for answer in answers:
        if answer.get("reasoning_budget") == last:
            by_row.setdefault((answer["prompt"], answer.get("prompt_index", answer.get("row"))), []).append(answer)
    seen: Counter[str] = Counter()
    groups = {}
    for (prompt, _), group in by_row.items():
        groups[prompt, seen[prompt]] = group
        seen[prompt] += 1
    return groups


def _lines(a: str, b: str, result: Comparison) -> Iterator[str]:
    accuracy = result.accuracy
    yield f"A {a}, B {b}: {accuracy.num_prompts} prompts in both" + (
        f", {result.num_unpaired} left out" if result.num_unpaired else ""
    )
    yield (
        f"{result.reward}: {accuracy.mean_a:.1%} -> {accuracy.mean_b:.1%}, difference {100 * accuracy.difference:+.1f} "
        f"[{100 * accuracy.low:+.1f}, {100 * accuracy.high:+.1f}] points"
    )
    test = "" if result.p_value is None else f"; McNemar's exact test: p = {result.p_value:.3g}"
    yield f"  right in B alone {result.only_b}, right in A alone {result.only_a}{test}"
    for name, values in result.rewards.items():
        yield (
            f"  {name}: mean {values.mean_a:.4g} -> {values.mean_b:.4g}, difference {values.difference:+.4g} "
            f"[{values.low:+.4g}, {values.high:+.4g}]"
        )
    for direction in ("right in B alone", "right in A alone"):
        rows = [row for row in result.changed if row["direction"] == direction]
        if rows:
            yield f"{direction}:"
        for row in rows[:MAX_ROWS]:
            yield f"  {row['row']}: {_short(row['prompt'])}"
            yield f"    A {_short(row['a'])}"
            yield f"    B {_short(row['b'])}"
        if len(rows) > MAX_ROWS:
            yield f"  and {len(rows) - MAX_ROWS} more: --out FILE writes all"


def _short(text: object) -> str:
    """Return a text in one line, its end rather than its beginning: the answer is there."""
    line = " ".join(str(text).replace("<sep>", " ").split()).removesuffix("assistant:").strip()
    return line if len(line) <= MAX_CHARACTERS else f"...{line[3 - MAX_CHARACTERS :]}"
