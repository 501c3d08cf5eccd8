"""What a step leaves behind: one record a completion, and the step's metrics as means over those records."""

import math
import time
from collections.abc import Iterable, Sequence
from statistics import fmean, pstdev
from typing import Any

from torch import Tensor

from data.chat import Ending
from trainer.rloo.rollouts import Group

RolloutRecord = dict[str, Any]
HEADLINE = ["reward", "kl", "completion_length", "share_stop", "tokens_per_second"]


def rollout_records(
    step: int, groups: Sequence[Group], advantages_N: Tensor, logprobs_N: Tensor | None, kl_N: Tensor | None
) -> list[RolloutRecord]:
    """A JSON-ready record for each completion of the groups, in order.

    logprobs_N, kl_N: sequence sums under the trained policy and their difference to the reference, None where the
    groups were not run
    """
    members = [(group, place) for group in groups for place in range(len(group.completions))]
    nothing: list[float | None] = [None] * len(members)
    logprobs = nothing if logprobs_N is None else logprobs_N.tolist()
    kls = nothing if kl_N is None else kl_N.tolist()
    return [
        {
            "step": step,
            "slot": group.slot,
            "row": group.prompt.row.where,
            "prompt": group.prompt.text,
            "completion": group.texts[place],
            "completion_ids": group.completions[place].ids,
            "ending": group.completions[place].ending.value,
            "rewards": {name: values[place] for name, values in group.rewards_by_name.items()},
            "reward": None if math.isnan(group.rewards[place]) else group.rewards[place],
            "advantage": advantage,
            "kl": kl,
            "logprob": logprob,
            "sampler_logprob": sum(group.completions[place].logprobs),
        }
        for (group, place), advantage, logprob, kl in zip(members, advantages_N.tolist(), logprobs, kls, strict=True)
    ]


def step_metrics(records: Sequence[RolloutRecord]) -> dict[str, float | int | None]:
    """Metrics of a step from the records of all its completions, whichever process they come from.

    reward, reward/NAME:    mean over the completions that have one (None: nobody has); reward_std likewise
    none/NAME:              share of completions to which a reward does not apply
    share_zero_variance:    share of groups whose scorable rewards are all equal, which teach nothing but the KL
    kl:                     mean over completions of the sequence sum, nats; None without a reference
    entropy:                mean of -log p over the sampled tokens, nats a token; its fall is the policy narrowing
    sampler_mismatch:       mean over trained completions of |log p when sampled - log p when trained|, nats
    share_stop, _eos, _length: how completions ended
    """
    lengths = [len(record["completion_ids"]) for record in records]
    rewards = [record["reward"] for record in records if record["reward"] is not None]
    groups: dict[int, set[float]] = {record["slot"]: set() for record in records}
    for record in records:
        if record["reward"] is not None:
            groups[record["slot"]].add(record["reward"])
    metrics: dict[str, float | int | None] = {
        "reward": _mean(rewards),
        "reward_std": pstdev(rewards) if rewards else None,
    }
    for name in records[0]["rewards"]:
        values = [record["rewards"][name] for record in records]
        metrics[f"reward/{name}"] = _mean(values)
        metrics[f"none/{name}"] = values.count(None) / len(records)
    metrics["share_zero_variance"] = sum(len(different) <= 1 for different in groups.values()) / len(groups)
    metrics["kl"] = _mean(record["kl"] for record in records)
    metrics["entropy"] = -sum(record["sampler_logprob"] for record in records) / sum(lengths)
    metrics["sampler_mismatch"] = _mean(
        abs(record["sampler_logprob"] - record["logprob"]) for record in records if record["logprob"] is not None
    )
    metrics["completion_length"] = fmean(lengths)
    for ending in Ending:
        metrics[f"share_{ending}"] = sum(record["ending"] == ending for record in records) / len(records)
    return metrics


def _mean(values: Iterable[float | None]) -> float | None:
    given = [value for value in values if value is not None]
    return fmean(given) if given else None


class Clock:
    """Seconds of a step by phase, on the process that asks."""

    def __init__(self) -> None:
        self._phases: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """End a phase."""
        now = time.perf_counter()
        self._phases[phase] = now - self._last
        self._last = now

    def metrics(self, num_tokens: int) -> dict[str, float]:
        """`seconds_PHASE`, and tokens trained a second over the whole step."""
        seconds = {f"seconds_{phase}": spent for phase, spent in self._phases.items()}
        return {**seconds, "tokens_per_second": num_tokens / sum(self._phases.values())}
