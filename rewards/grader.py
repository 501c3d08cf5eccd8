"""Run the rewards of a recipe: scorers in workers as completions end, batch functions after the last completion.

A reward that fails is an error and not a bad answer: it is counted, and its completion has no total. The first failure
of each reward is logged with its traceback, and a run in which too many completions fail stops.
"""

import logging
import math
import threading
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from rekatrain.data.errors import InputError
from rekatrain.rewards.calls import BatchCaller, call_batch_functions, set_up
from rekatrain.rewards.compose import RewardFunction
from rekatrain.rewards.errors import RewardError
from rekatrain.rewards.outcome import MAX_REWARD, Outcome
from rekatrain.rewards.progress import Progress
from rekatrain.rewards.scoring import Scores, ScoringConfig
from rekatrain.rewards.workers.pool import Job, Limits, WorkerPool, num_workers_here

logger = logging.getLogger(__name__)

# The fraction of errors is taken over a reward's last 512 completions, and from 16 completions on.
ERROR_WINDOW, ERROR_MINIMUM = 512, 16


@dataclass(kw_only=True)
class _History:
    """The record of one reward: which of its last completions failed, and its seconds since the last report."""

    failed: deque[bool] = field(default_factory=lambda: deque(maxlen=ERROR_WINDOW))
    first_traceback: str = ""
    has_scored: bool = False
    seconds: float = 0.0


class Grader:
    """Scores batches of completions by `functions`; has worker processes if one of them is a scorer."""

    def __init__(
        self,
        functions: Sequence[RewardFunction],
        config: ScoringConfig | None = None,
        *,
        unbroken: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Prepare to score.

        unbroken: makes the context in which work is sent to the workers. The queue to them has threads, so a signal's
                  handler must not raise there.
        """
        self.turn = threading.Lock()  # for threads that call `score`
        self._unbroken = unbroken
        self.functions = list(functions)
        self.config = config or ScoringConfig()
        self._scorers = [function for function in self.functions if function.scorer is not None]
        self._batches = [
            BatchCaller(function, function.timeout or self.config.batch_timeout)
            for function in self.functions
            if function.scorer is None
        ]
        self._history = {function.name: _History() for function in self.functions}
        self._is_set_up, self._progress = False, Progress()
        self._pool = WorkerPool(
            [function.scorer for function in self._scorers if function.scorer is not None],
            num_workers=self.config.num_workers or num_workers_here(),
            limits=Limits(timeout=self.config.timeout, memory=int(self.config.memory_limit_gb * (1 << 30))),
            environment=self.config.environment,
        )

    def warm_up(self) -> None:
        """Set up the batch functions, and start the imports of the workers without waiting for them.

        A reward model that cannot be loaded is then reported at the start of a run, not after its first rollouts.
        """
        if self._scorers:
            self._pool.warm_up()
        self._set_up()

    def submit(
        self, completion: str, columns: Mapping[str, Any], judges: Collection[str] | None = None
    ) -> list[Job | None]:
        """Start scoring a finished completion, with the columns of its row; never waits.

        judges: names of the rewards that judge it; None means all. The others get no job.
        """
        jobs: list[Job | None] = []
        for number, scorer in enumerate(self._scorers):
            if judges is not None and scorer.name not in judges:
                jobs.append(None)
                continue
            values = {name: columns[name] for name in scorer.columns}
            with self._unbroken():
                jobs.append(self._pool.submit(number, completion, values, scorer.seconds_for(values)))
        return jobs

    def score(
        self,
        *,
        prompts: list[str],
        completions: list[str],
        completion_ids: list[list[int]],
        columns: dict[str, list[Any]],
        judges: Sequence[Collection[str] | None] | None = None,
        submitted: Mapping[int, list[Job | None]] | None = None,
        progress: Progress | None = None,
    ) -> Scores:
        """Score each completion by each reward, or by those that `judges` names for it; the others do not apply.

        All lists, also those of `columns`, have one entry per completion. `submitted` maps the index of a completion
        whose scoring has been started to its jobs. `progress` decides weights that have a schedule.
        Raises InputError for a missing column, or if a reward raises it before it has scored any row, and RewardError
        if a reward has failed too often.
        """
        judges = judges or [None] * len(completions)
        judged = {
            function.name: [index for index, names in enumerate(judges) if names is None or function.name in names]
            for function in self.functions
        }
        check_columns([function for function in self.functions if judged[function.name]], columns)
        jobs = [
            (submitted or {}).get(index)
            or self.submit(text, {name: columns[name][index] for name in columns}, judges[index])
            for index, text in enumerate(completions)
        ]
        # TRL leaves a column of such a name out, too.
        arguments = {**columns, "prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        progress = self._progress = progress or Progress()
        self._set_up()
        outcomes = self._score_batches(arguments, judged, progress)
        for number, scorer in enumerate(self._scorers):
            of_scorer = [of_completion[number] for of_completion in jobs]
            outcomes[scorer.name] = [Outcome() if job is None else self._result(scorer, job) for job in of_scorer]
        for function in self.functions:
            self._watch(function.name, [outcomes[function.name][index] for index in judged[function.name]])
        return _combine(self.functions, outcomes, len(completions), progress.step)

    def metrics(self) -> dict[str, float]:
        """Return metrics since the last call: seconds of each reward, weights on a schedule, and batch classes' own."""
        metrics = {}
        for function in self.functions:
            metrics[f"rewards/{function.name}/seconds"] = self._history[function.name].seconds
            self._history[function.name].seconds = 0.0
            if function.schedule is not None:
                metrics[f"rewards/{function.name}/weight"] = function.weight_at(self._progress.step)
            if function.scorer is None and hasattr(function.function, "metrics"):
                own = function.function.metrics()
                metrics.update({f"rewards/{function.name}/{key}": float(value) for key, value in own.items()})
        return metrics

    def close(self) -> None:
        """End the workers."""
        self._pool.close()

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _score_batches(
        self, arguments: Mapping[str, list[Any]], judged: Mapping[str, list[int]], progress: Progress
    ) -> dict[str, list[Outcome]]:
        """Call the batch functions on the completions that each judges; functions with the same ones together."""
        size = len(arguments["completions"])
        outcomes: dict[str, list[Outcome]] = {}
        for indices in dict.fromkeys(tuple(judged[caller.reward.name]) for caller in self._batches):
            together = [caller for caller in self._batches if tuple(judged[caller.reward.name]) == indices]
            some = {name: [values[index] for index in indices] for name, values in arguments.items()}
            called = call_batch_functions(together, some, len(indices), progress) if indices else {}
            for name in (caller.reward.name for caller in together):
                outcomes[name] = [Outcome()] * size
                for index, outcome in zip(indices, called.get(name, ()), strict=True):
                    outcomes[name][index] = outcome
        return outcomes

    def _result(self, scorer: RewardFunction, job: Job) -> Outcome:
        """Return the outcome of a job; 0 for one that is late, where the recipe says so."""
        outcome = self._pool.result(job)
        is_zero = outcome.is_late and scorer.on_timeout == "zero"
        return Outcome(value=0.0, seconds=outcome.seconds) if is_zero else outcome

    def _set_up(self) -> None:
        if not self._is_set_up:
            for caller in self._batches:
                setup = getattr(caller.reward.function, "setup", None)
                if setup is not None:
                    set_up(caller.reward.name, setup)
            self._is_set_up = True

    def _watch(self, name: str, outcomes: Sequence[Outcome]) -> None:
        """Count the failures; log the first; raise RewardError if too many of the last completions failed, or all."""
        history = self._history[name]
        history.seconds += sum(outcome.seconds for outcome in outcomes)
        failures = [outcome for outcome in outcomes if outcome.error]
        history.has_scored |= len(failures) < len(outcomes)
        if not history.has_scored:
            # It has never scored a row: the recipe is wrong, or all of the data.
            for outcome in failures:
                if outcome.is_input:
                    raise InputError(outcome.error)
        is_first = bool(failures) and not history.first_traceback
        if is_first:
            history.first_traceback = (failures[0].traceback or failures[0].error).rstrip()
        history.failed.extend(bool(outcome.error) for outcome in outcomes)
        num_failed, num_scored = sum(history.failed), len(history.failed)
        is_too_much = num_scored >= ERROR_MINIMUM and num_failed > self.config.max_error_share * num_scored
        is_all = num_failed == num_scored and self.config.max_error_share < 1
        if failures and (is_too_much or is_all):
            raise RewardError(
                f"reward {name} failed on {num_failed} of its last {num_scored} completions "
                f"(scoring.max_error_share is {self.config.max_error_share:g}); the first failure:\n"
                f"{history.first_traceback}"
            )
        if is_first:
            shown = history.first_traceback
            logger.warning("reward %s failed on a completion; the traceback of this first failure:\n%s", name, shown)


def check_columns(functions: Sequence[RewardFunction], column_names: Collection[str]) -> None:
    """Raise InputError if the rows lack a column that a reward needs."""
    for function in functions:
        for column in function.columns:
            if column not in column_names:
                known = ", ".join(sorted(column_names)) or "none"
                raise InputError(
                    f"reward {function.name} needs the column {column}, which the rows do not have (columns: {known}); "
                    "add it to the data or take the reward out of the recipe"
                )


def _combine(
    functions: Sequence[RewardFunction], outcomes: Mapping[str, Sequence[Outcome]], size: int, step: int
) -> Scores:
    """Add the rewards of each completion up, with the weights after `step` steps.

    A completion cannot be scored if no reward with a weight applies, or if one with a weight, or one that it requires,
    has failed. A reward counts 0 if one that it requires gives less than 1.0; a required one that does not apply is no
    obstacle.

    outcomes: for each reward, an outcome per completion
    """
    by_one = [{function.name: outcomes[function.name][index] for function in functions} for index in range(size)]
    values = [{name: outcome.value for name, outcome in one.items()} for one in by_one]
    errors = [{name: outcome.error for name, outcome in one.items() if outcome.error} for one in by_one]
    terms = [_terms(functions, *one, step) for one in zip(values, errors, strict=True)]
    return Scores(
        by_name={function.name: [one[function.name] for one in values] for function in functions},
        total=[_add(of_completion) for of_completion in terms],
        terms=terms,
        errors=errors,
        metrics=[{name: outcome.metrics for name, outcome in one.items() if outcome.metrics} for one in by_one],
        notes=[{name: outcome.notes for name, outcome in one.items() if outcome.notes is not None} for one in by_one],
    )


def _terms(
    functions: Sequence[RewardFunction],
    values: Mapping[str, float | None],
    failed: Collection[str],
    step: int,
) -> dict[str, tuple[float, float]] | None:
    """Return the weight and the value of each reward that counts for a completion; None if it cannot be scored."""
    terms = {}
    for function in functions:
        weight = function.weight if function.schedule is None else function.schedule.at(step)
        if not weight:
            continue
        if any(name in failed for name in (function.name, *function.requires)):
            return None
        value = values[function.name]
        if value is not None:
            gates = [values[name] for name in function.requires]
            is_open = all(gate is None or gate >= 1.0 for gate in gates)
            terms[function.name] = (weight, value if is_open else 0.0)
    return terms or None


def _add(terms: Mapping[str, tuple[float, float]] | None) -> float:
    """Return the weighted sum, or nan for a completion that cannot be scored; raise RewardError beyond float32."""
    if terms is None:
        return math.nan
    parts = [weight * value for weight, value in terms.values()]
    total = math.fsum(parts)
    if abs(total) > MAX_REWARD:
        raise RewardError(
            f"the weighted rewards {parts} of a completion add up to {total:g}, which float32 cannot hold"
        )
    return total
