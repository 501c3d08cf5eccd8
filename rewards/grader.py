"""Runs the rewards of a recipe on completions: scorers in workers as completions end, batch functions at the end.

A grader that fails is an error and not a bad answer: it is counted, its completion has no total, and a run in which too
many fail stops with the first traceback.
"""

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from annotated_types import Ge, Gt, Le

from rekatrain.rewards.batch_calls import call_batch_functions
from rekatrain.rewards.compose import RewardFunction, check_columns, total_reward
from rekatrain.rewards.errors import RewardError
from rekatrain.rewards.workers.pool import Job, Limits, WorkerPool, num_workers_here
from rekatrain.rewards.workers.process import Score

logger = logging.getLogger(__name__)

# A reward's share of errors is that of its last so many completions, and means nothing before so many.
ERROR_WINDOW, ERROR_MINIMUM = 512, 16


@dataclass(frozen=True, kw_only=True)
class ScoringConfig:
    """What a recipe's `scoring:` section can say: how its rewards are run.

    num_workers:     processes that score completions, for each training process; None: one for each of its cores
    timeout:         seconds after which a worker is killed, for each completion and reward; a reward can have its own
    batch_timeout:   seconds for a batch function; a plain one that takes longer ends the run
    memory_limit_gb: address space of a worker
    max_error_share: share of a reward's last 512 completions that may fail before the run stops
    """

    num_workers: Annotated[int, Ge(1)] | None = None
    timeout: Annotated[float, Gt(0)] = 2.0
    batch_timeout: Annotated[float, Gt(0)] = 600.0
    memory_limit_gb: Annotated[float, Gt(0)] = 4.0
    max_error_share: Annotated[float, Ge(0), Le(1)] = 0.2


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a batch of completions earned.

    by_name: for each reward, one value a completion, unweighted; None where it does not apply or has failed
    total:   the weighted sum of each completion, nan where every reward with a weight is None or one has failed
    errors:  for each completion, what went wrong: reward -> one line
    """

    by_name: dict[str, list[float | None]]
    total: list[float]
    errors: list[dict[str, str]]


@dataclass(kw_only=True)
class _History:
    """What a reward has done so far: whether its last completions failed, and its seconds since the last report."""

    failed: deque[bool] = field(default_factory=lambda: deque(maxlen=ERROR_WINDOW))
    first_traceback: str = ""
    seconds: float = 0.0


class Grader:
    """Scores batches of completions by `functions`; has worker processes where one of them is a scorer."""

    def __init__(self, functions: Sequence[RewardFunction], config: ScoringConfig | None = None) -> None:
        self.functions = list(functions)
        self.config = config or ScoringConfig()
        self._scorers = [function for function in self.functions if function.scorer is not None]
        self._batches = [
            replace(function, timeout=function.timeout or self.config.batch_timeout)
            for function in self.functions
            if function.scorer is None
        ]
        self._history = {function.name: _History() for function in self.functions}
        self._is_set_up = False
        self._pool = WorkerPool(
            [function.scorer for function in self._scorers if function.scorer is not None],
            num_workers=self.config.num_workers or num_workers_here(),
            limits=Limits(timeout=self.config.timeout, memory=int(self.config.memory_limit_gb * (1 << 30))),
        )

    def warm_up(self) -> None:
        """Set the batch functions up, and let the workers do their imports while something else goes on.

        A reward's model or server that cannot be had is then told at the start of a run, and not after its first step.
        """
        if self._scorers:
            self._pool.warm_up()
        self._set_up()

    def submit(self, completion: str, columns: Mapping[str, Any]) -> list[Job]:
        """Start scoring a completion that has ended, with the columns of its row; never waits."""
        return [
            self._pool.submit(number, completion, {name: columns[name] for name in scorer.columns}, scorer.timeout)
            for number, scorer in enumerate(self._scorers)
        ]

    def score(
        self,
        *,
        prompts: list[str],
        completions: list[str],
        completion_ids: list[list[int]],
        columns: dict[str, list[Any]],
        submitted: Mapping[int, list[Job]] | None = None,
    ) -> Scores:
        """Score each completion by each reward; all lists have one entry a completion, and columns are the rows'.

        `submitted` are the jobs of completions that have been started already, by their place. Raises InputError for
        what the user can mend, and RewardError where a reward has failed too often.
        """
        check_columns(self.functions, columns)
        jobs = [
            (submitted or {}).get(place) or self.submit(text, {name: columns[name][place] for name in columns})
            for place, text in enumerate(completions)
        ]
        arguments = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids, **columns}
        self._set_up()
        scores = call_batch_functions(self._batches, arguments, len(completions))
        for number, scorer in enumerate(self._scorers):
            scores[scorer.name] = [self._pool.result(of_completion[number]) for of_completion in jobs]
        for function in self.functions:
            self._watch(function.name, scores[function.name])

        by_name = {function.name: [score.value for score in scores[function.name]] for function in self.functions}
        errors = [
            {name: of_reward[place].error for name, of_reward in scores.items() if of_reward[place].error}
            for place in range(len(completions))
        ]
        total = [
            total_reward(self.functions, {name: values[place] for name, values in by_name.items()}, errors[place])
            for place in range(len(completions))
        ]
        return Scores(by_name=by_name, total=total, errors=errors)

    def metrics(self) -> dict[str, float]:
        """Since the last call: seconds/NAME, of all completions together, and what batch classes tell of themselves."""
        found = {}
        for function in self.functions:
            found[f"seconds/{function.name}"] = self._history[function.name].seconds
            self._history[function.name].seconds = 0.0
            if function.scorer is None and hasattr(function.function, "metrics"):
                told = function.function.metrics()
                found.update({f"{function.name}/{key}": float(value) for key, value in told.items()})
        return found

    def close(self) -> None:
        """End the workers."""
        self._pool.close()

    def __enter__(self) -> "Grader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _set_up(self) -> None:
        if not self._is_set_up:
            for function in self._batches:
                setup = getattr(function.function, "setup", None)
                if setup is not None:
                    setup()
            self._is_set_up = True

    def _watch(self, name: str, scores: Sequence[Score]) -> None:
        """Count what failed; RewardError where it is too much of the last completions, or has been all of them."""
        history = self._history[name]
        history.seconds += sum(score.seconds for score in scores)
        failures = [score for score in scores if score.error]
        if failures and not history.first_traceback:
            history.first_traceback = failures[0].traceback or failures[0].error
            logger.warning("reward %s failed on a completion: %s", name, failures[0].error)
        history.failed.extend(bool(score.error) for score in scores)
        num_failed, num_scored = sum(history.failed), len(history.failed)
        is_too_much = num_scored >= ERROR_MINIMUM and num_failed > self.config.max_error_share * num_scored
        if failures and (is_too_much or num_failed == num_scored):
            raise RewardError(
                f"reward {name} failed on {num_failed} of its last {num_scored} completions "
                f"(scoring.max_error_share is {self.config.max_error_share:g}); the first failure:\n"
                f"{history.first_traceback.rstrip()}"
            )


def score_completions(
    functions: Sequence[RewardFunction],
    *,
    prompts: list[str],
    completions: list[str],
    completion_ids: list[list[int]],
    columns: dict[str, list[Any]],
) -> Scores:
    """Score one batch, with workers of its own; see `Grader.score`."""
    with Grader(functions) as grader:
        return grader.score(prompts=prompts, completions=completions, completion_ids=completion_ids, columns=columns)
