"""What a step leaves behind: one record a completion, and the step's metrics as means over those records."""

import math
import time
from collections.abc import Callable, Sequence
from statistics import fmean, pstdev
from typing import Any

from torch import Tensor

from data.chat import Ending
from trainer.rloo.rollouts import Group

RolloutRecord = dict[str, Any]
HEADLINE = ["reward", "kl", "completion_length", "share_stop", "tokens_per_second"]


def rollout_records(
    step: int, groups: Sequence[Group], logprobs_N: Tensor, kl_N: Tensor, advantages_N: Tensor
) -> list[RolloutRecord]:
    """A JSON-ready record for each completion of the groups; the tensors are sequence sums in the groups' order."""
    members = [(group, place) for group in groups for place in range(len(group.completions))]
    sums = zip(logprobs_N.tolist(), kl_N.tolist(), advantages_N.tolist(), strict=True)
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
        for (group, place), (logprob, kl, advantage) in zip(members, sums, strict=True)
    ]


def step_metrics(records: Sequence[RolloutRecord]) -> dict[str, float | int | None]:
    """Metrics of a step from the records of all its completions, whichever process they come from.

    reward, reward/NAME:    mean over the completions that have one (None: nobody has); reward_std likewise
    none/NAME:              share of completions to which a reward does not apply
    share_zero_variance:    share of groups whose rewards are all equal, which teach nothing but the KL
    kl:                     mean over completions of the sequence sum, nats
    entropy:                mean of -log p over the sampled tokens, nats a token; its fall is the policy narrowing
    sampler_mismatch:       mean over completions of |log p when sampled - log p when trained|, nats; rounding when on-policy
    share_stop, _eos, _length: how completions ended
    """
    lengths = [len(record["completion_ids"]) for record in records]
    rewards = [record["reward"] for record in records if record["reward"] is not None]
    groups: dict[int, set[float | None]] = {}
    for record in records:
        groups.setdefault(record["slot"], set()).add(record["reward"])
    metrics: dict[str, float | int | None] = {
        "reward": fmean(rewards) if rewards else None,
        "reward_std": pstdev(rewards) if rewards else None,
    }
    for name in records[0]["rewards"]:
        given = [record["rewards"][name] for record in records if record["rewards"][name] is not None]
        metrics[f"reward/{name}"] = fmean(given) if given else None
        metrics[f"none/{name}"] = 1 - len(given) / len(records)
    metrics["share_zero_variance"] = sum(len(rewards) == 1 for rewards in groups.values()) / len(groups)
    metrics["kl"] = fmean(record["kl"] for record in records)
    metrics["entropy"] = -sum(record["logprob"] for record in records) / sum(lengths)
    metrics["sampler_mismatch"] = fmean(abs(record["sampler_logprob"] - record["logprob"]) for record in records)
    metrics["completion_length"] = fmean(lengths)
    for ending in Ending:
        metrics[f"share_{ending}"] = sum(record["ending"] == ending for record in records) / len(records)
    return metrics


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
