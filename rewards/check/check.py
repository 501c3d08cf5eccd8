"""Check the rewards of a recipe against its data: right answers must earn full marks, and wrong ones must not.

check = check_golds(functions, rows, ScoringConfig(), num_wrong=200)
print(describe_check(check))
"""

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from rekatrain.data.rows import Row
from rekatrain.rewards.check.cases import GOLD, RESPONSE, Case, make_cases, run_cases
from rekatrain.rewards.compose import RewardFunction
from rekatrain.rewards.outcome import Outcome
from rekatrain.rewards.scoring import ScoringConfig

NUM_SLOWEST = 5
MAX_EXAMPLES = 5
SHOWN = 80


@dataclass(kw_only=True)
class GoldTable:
    """The rewards of one scorer for the right answers of one source.

    kind:     GOLD, or RESPONSE for the rows' reference responses, of which nothing is known
    values:   of the answers that have one
    examples: of golds that do not earn 1.0, as text
    """

    source: str
    reward: str
    kind: str
    values: list[float] = field(default_factory=list)
    num_none: int = 0
    num_errors: int = 0
    seconds: float = 0.0
    examples: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Reward and source, as text."""
        return f"{self.reward} of {self.source}" if self.source else self.reward

    @property
    def num_rows(self) -> int:
        """Number of answers."""
        return len(self.values) + self.num_none + self.num_errors

    @property
    def mean(self) -> float | None:
        """Mean of the values; None without any."""
        return fmean(self.values) if self.values else None

    def counts(self) -> tuple[int, int, int, int, int]:
        """Return the numbers of answers with 1, 0, another value, None and an error."""
        ones, zeros = self.values.count(1.0), self.values.count(0.0)
        return ones, zeros, len(self.values) - ones - zeros, self.num_none, self.num_errors

    @property
    def is_sound(self) -> bool:
        """True unless these are golds of which none earns more than 0."""
        return self.kind != GOLD or any(value > 0 for value in self.values)


@dataclass(kw_only=True)
class WrongTable:
    """The wrong answers that one mutation made from the golds of one source; `examples` earn 1.0."""

    source: str
    reward: str
    mutation: str
    num_made: int = 0
    num_passed: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class RewardCheck:
    """The result of a check.

    without_gold: rewards, or a reward of a source, that were not checked or not on all rows -> why
    slowest:      seconds and description of the answers that took longest, slowest first
    """

    num_rows: int
    golds: list[GoldTable] = field(default_factory=list)
    wrong: list[WrongTable] = field(default_factory=list)
    without_gold: dict[str, str] = field(default_factory=dict)
    slowest: list[tuple[float, str]] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        """True unless a reward gives no gold of a source more than 0."""
        return all(table.is_sound for table in self.golds)

    def hints(self) -> list[str]:
        """Return advice on rewards that give all golds of a source the same bad result."""
        hints = []
        for table in self.golds:
            example = table.examples[0] if table.examples else ""
            if table.num_none == table.num_rows:
                hints.append(
                    f"{table.name}: every row is None, so the reward can grade none of them: its column may hold no "
                    f"answer that it reads ({example}). Choose another reward (exact_match for words), map the column "
                    "by dataset.columns, or name the rewards of the source in its `rewards`"
                )
            elif table.num_errors == table.num_rows:
                hints.append(f"{table.name}: the reward fails on every row: {example}")
            elif not table.is_sound:
                hints.append(
                    f"{table.name}: no gold earns more than 0 ({example}): the column may hold more than the answer, "
                    "such as a whole solution, or the options may be too strict"
                )
        return hints


def check_golds(
    functions: Sequence[RewardFunction], rows: Sequence[Row], config: ScoringConfig, *, num_wrong: int
) -> RewardCheck:
    """Score the gold of each row by its own rewards, and wrong answers to `num_wrong` rows of each source and reward.

    Rewards are called in worker processes, each alone: weights and `requires` have no part in it.
    """
    check = RewardCheck(num_rows=len(rows))
    cases = make_cases(functions, rows, num_wrong=num_wrong)
    golds: dict[tuple[str, str], GoldTable] = {}
    wrong: dict[tuple[str, str, str], WrongTable] = {}
    for case, outcome in run_cases(cases, config):
        source, reward = case.row.source.name, case.reward.name
        if case.kind in (GOLD, RESPONSE):
            _count(
                golds.setdefault((source, reward), GoldTable(source=source, reward=reward, kind=case.kind)),
                case,
                outcome,
            )
        else:
            key = (source, reward, case.kind)
            _count_wrong(
                wrong.setdefault(key, WrongTable(source=source, reward=reward, mutation=case.kind)), case, outcome
            )
        seconds = (outcome.seconds, f"{reward}, {case.row.where}, {case.kind}")
        (heapq.heappush if len(check.slowest) < NUM_SLOWEST else heapq.heappushpop)(check.slowest, seconds)
    check.golds, check.wrong = list(golds.values()), list(wrong.values())
    check.slowest.sort(reverse=True)
    checked = {reward for _, reward in golds}
    for function in functions:
        if function.name not in checked:
            check.without_gold[function.name] = _why_unchecked(function)
    check.without_gold |= _find_missing(functions, rows, golds)
    return check


def _find_missing(
    functions: Sequence[RewardFunction], rows: Sequence[Row], golds: Mapping[tuple[str, str], GoldTable]
) -> dict[str, str]:
    """Describe the rows that a checked reward judges and that have no gold for it, by source."""
    missing = {}
    for function in functions:
        if not any(reward == function.name for _, reward in golds):
            continue
        judged = Counter(row.source.name for row in rows if row.source.is_judged_by(function.name))
        for source, number in judged.items():
            table = golds.get((source, function.name), GoldTable(source=source, reward=function.name, kind=GOLD))
            if table.num_rows < number:
                what = "gold" if function.gold is not None else "reference response"
                missing[table.name] = f"{number - table.num_rows:,} of {number:,} rows have no {what}"
    return missing


def _why_unchecked(function: RewardFunction) -> str:
    if function.scorer is None:
        return "not checked, a batch function has no gold"
    if function.gold is None:
        return "not checked, it has no gold, and the rows have no reference response"
    return "not checked, no row has the columns of its gold"


def _count(table: GoldTable, case: Case, outcome: Outcome) -> None:
    table.seconds += outcome.seconds
    if outcome.error:
        table.num_errors += 1
    elif outcome.value is None:
        table.num_none += 1
    else:
        table.values.append(outcome.value)
    if (case.kind == GOLD and outcome.value != 1.0) or outcome.error or outcome.value is None:
        result = outcome.error or str(outcome.value)
        if len(table.examples) < MAX_EXAMPLES:
            table.examples.append(f"{case.row.where}: {_shown(case.answer)} gives {result}")


def _count_wrong(table: WrongTable, case: Case, outcome: Outcome) -> None:
    table.num_made += 1
    if outcome.value is not None and outcome.value >= 1.0:
        table.num_passed += 1
        if len(table.examples) < MAX_EXAMPLES:
            table.examples.append(f"{case.row.where}: {_shown(case.answer)} for {_shown(case.gold)}")


def _shown(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= SHOWN else f"{line[: SHOWN // 2]} ... {line[-SHOWN // 4 :]}")
