"""The answers that `rekatrain check-rewards` has scored: golds of rows, and wrong answers made from some of them."""

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rekatrain.data.chat import render_completion, split_turn
from rekatrain.data.rows import Row
from rekatrain.rewards.check.mutations import wrong_answers
from rekatrain.rewards.compose import RewardFunction
from rekatrain.rewards.gold import gold_answer
from rekatrain.rewards.outcome import Outcome
from rekatrain.rewards.scoring import ScoringConfig
from rekatrain.rewards.workers.pool import Job, Limits, WorkerPool, num_workers_here

logger = logging.getLogger(__name__)

GOLD, RESPONSE = "gold", "response"
AHEAD = 64  # jobs per worker that wait in the queue
REPORT_SECONDS = 5.0
LOOK_AHEAD = 50  # rows that are searched for another gold


@dataclass(frozen=True, kw_only=True)
class Case:
    """One answer to a row, for one reward.

    kind:      GOLD, RESPONSE for the reference response where the reward declares no gold, or the name of a mutation
    reasoning: of a reference response
    """

    reward: RewardFunction
    row: Row
    kind: str
    answer: str
    gold: str
    reasoning: str | None = None


def make_cases(functions: Sequence[RewardFunction], rows: Sequence[Row], *, num_wrong: int) -> list[Case]:
    """Return the cases of all scorers; wrong answers for `num_wrong` rows of each reward and source, evenly spread."""
    cases: list[Case] = []
    for function in functions:
        if function.scorer is None:
            continue
        by_source: dict[str, list[Case]] = {}
        for row in rows:
            if row.source.is_judged_by(function.name) and (case := _gold_case(function, row)) is not None:
                by_source.setdefault(row.source.name, []).append(case)
        for of_source in by_source.values():
            cases += of_source
            cases += _wrong_cases([case for case in of_source if case.kind == GOLD], num_wrong)
    return cases


def _gold_case(function: RewardFunction, row: Row) -> Case | None:
    last = row.messages[-1] if row.messages else None
    thought, response = split_turn(last) if last is not None and last["role"] == "assistant" else (None, None)
    if function.gold is not None:
        kind, thought, answer = GOLD, None, gold_answer(function.gold, row.columns, response)
    else:
        kind, answer = RESPONSE, response
    if answer is None:
        return None
    return Case(reward=function, row=row, kind=kind, reasoning=thought, answer=answer, gold=answer)


def _wrong_cases(golds: Sequence[Case], num_wrong: int) -> Iterator[Case]:
    stride = max(1, len(golds) / num_wrong) if num_wrong else len(golds) + 1
    for index in sorted({int(number * stride) for number in range(num_wrong)}):
        if index >= len(golds):
            return
        case = golds[index]
        nearby = [golds[(index + distance) % len(golds)] for distance in range(1, min(len(golds), LOOK_AHEAD))]
        other = next((near.answer for near in nearby if near.answer != case.answer), None)
        for kind, answer in wrong_answers(case.answer, other).items():
            yield Case(reward=case.reward, row=case.row, kind=kind, answer=answer, gold=case.answer)


def run_cases(cases: Sequence[Case], config: ScoringConfig) -> Iterator[tuple[Case, Outcome]]:
    """Score the cases in worker processes, as a run would -> each with its outcome, in order."""
    functions = list({id(case.reward): case.reward for case in cases}.values())
    numbers = {id(function): number for number, function in enumerate(functions)}
    num_workers = config.num_workers or num_workers_here()
    pool = WorkerPool(
        [function.scorer for function in functions if function.scorer is not None],
        num_workers=num_workers,
        limits=Limits(timeout=config.timeout, memory=int(config.memory_limit_gb * (1 << 30))),
        environment=config.environment,
    )
    waiting: deque[tuple[Case, Job]] = deque()
    started = reported = time.monotonic()
    try:
        for number, case in enumerate([*cases, None], start=1):
            if case is not None:
                columns = {name: case.row.columns.get(name) for name in case.reward.columns}
                text = render_completion(case.reasoning, case.answer)
                seconds = case.reward.seconds_for(columns)
                waiting.append((case, pool.submit(numbers[id(case.reward)], text, columns, seconds)))
            while waiting and (case is None or len(waiting) > AHEAD * num_workers):
                scored, job = waiting.popleft()
                outcome = pool.result(job)
                is_zero = outcome.is_late and scored.reward.on_timeout == "zero"
                yield scored, Outcome(value=0.0, seconds=outcome.seconds) if is_zero else outcome
                now = time.monotonic()
                if now - reported > REPORT_SECONDS:
                    reported = now
                    num_done = min(number, len(cases)) - len(waiting)
                    rate = num_done / (now - started)
                    left = (len(cases) - num_done) / rate
                    logger.info("%d of %d answers scored, %.0f/s, about %.0f s left", num_done, len(cases), rate, left)
    finally:
        pool.close()
