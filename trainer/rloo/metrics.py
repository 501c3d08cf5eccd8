"""What a step leaves behind: one record a completion, and the step's metrics as means over those records."""

import math
import time
from collections.abc import Iterable, Sequence
from statistics import StatisticsError, correlation, fmean, pstdev
from typing import Any

from rekatrain.data.chat import Ending
from rekatrain.trainer.rloo.microbatch import Batch
from rekatrain.trainer.rloo.rollouts import Group

RolloutRecord = dict[str, Any]
HEADLINE = ["reward", "kl", "completion_length", "share_stop", "tokens_per_second"]


def batch_records(step: int, batch: Batch) -> list[RolloutRecord]:
    """A JSON-ready record for each completion of a trained batch, in order."""
    assert batch.old_logprobs is not None
    log_ratios_T = batch.old_logprobs - batch.sampler_logprobs
    values = {
        "advantage": batch.advantages,
        "kl": batch.kl,
        "logprob": batch.sums(batch.old_logprobs),
        "sampler_kl": batch.sums(log_ratios_T.expm1() - log_ratios_T),
        "clipped": batch.clipped,
    }
    columns = {name: [None] * len(batch.members) if N is None else N.tolist() for name, N in values.items()}
    return [
        _record(step, group, place, **{name: column[row] for name, column in columns.items()})
        for row, (group, place) in enumerate(batch.members)
    ]


def idle_records(step: int, groups: Sequence[Group]) -> list[RolloutRecord]:
    """The same for groups that were sampled and not trained on."""
    return [
        _record(step, group, place, advantage=0.0, kl=None, logprob=None, sampler_kl=None, clipped=None)
        for group in groups
        for place in range(len(group.completions))
    ]


def _record(step: int, group: Group, place: int, **trained: float | None) -> RolloutRecord:
    completion = group.completions[place]
    reward = group.rewards[place]
    return {
        "step": step,
        "slot": group.slot,
        "row": group.prompt.row.where,
        "prompt": group.prompt.text,
        "completion": group.texts[place],
        "completion_ids": completion.ids,
        "num_forced": len(completion.forced),
        "ending": completion.ending.value,
        "rewards": {name: values[place] for name, values in group.rewards_by_name.items()},
        "reward_errors": dict(group.reward_errors[place]),
        "reward": None if math.isnan(reward) else reward,
        "sampler_logprob": sum(completion.logprobs),
        **trained,
    }


def step_metrics(records: Sequence[RolloutRecord]) -> dict[str, float | int | None]:
    """Metrics of a step from the records of all its completions, whichever process they come from.

    reward, reward/NAME:    mean over the completions that have one (None: nobody has); reward_std likewise
    reward_std/NAME:        standard deviation over those completions
    none/NAME, errors/NAME: shares of completions to which a reward does not apply, and on which it failed
    length_correlation/NAME: correlation of a reward with the completion's tokens; None where either is constant
    share_zero_variance:    share of groups whose scorable rewards are all equal, which teach nothing but the KL
    kl:                     mean over completions of the sequence sum, nats; None without a reference
    entropy:                mean of -log p over the sampled tokens, nats a token; its fall is the policy narrowing
    sampler_mismatch:       mean over trained completions of |log p when sampled - log p when trained|, nats
    sampler_kl:             KL of the trainer's arithmetic from the sampler's, nats a token (the k3 estimate)
    clip_fraction:          share of ratios (of sequences, or of a sequence's tokens) that the last update's clip held
    share_forced:           share of completions whose reasoning was closed for them
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
        num_failed = sum(name in record["reward_errors"] for record in records)
        given = [(value, length) for value, length in zip(values, lengths, strict=True) if value is not None]
        metrics[f"reward/{name}"] = _mean(values)
        metrics[f"reward_std/{name}"] = pstdev([value for value, _ in given]) if given else None
        metrics[f"none/{name}"] = (values.count(None) - num_failed) / len(records)
        metrics[f"errors/{name}"] = num_failed / len(records)
        metrics[f"length_correlation/{name}"] = _correlation(given)
    metrics["share_zero_variance"] = sum(len(different) <= 1 for different in groups.values()) / len(groups)
    metrics["kl"] = _mean(record["kl"] for record in records)
    num_drawn = sum(lengths) - sum(record["num_forced"] for record in records)
    metrics["entropy"] = -sum(record["sampler_logprob"] for record in records) / num_drawn
    metrics["sampler_mismatch"] = _mean(
        abs(record["sampler_logprob"] - record["logprob"]) for record in records if record["logprob"] is not None
    )
    trained = [record for record in records if record["sampler_kl"] is not None]
    num_trained = sum(len(record["completion_ids"]) - record["num_forced"] for record in trained)
    metrics["sampler_kl"] = sum(record["sampler_kl"] for record in trained) / num_trained if num_trained else None
    metrics["clip_fraction"] = _mean(record["clipped"] for record in trained)
    metrics["share_forced"] = sum(record["num_forced"] > 0 for record in records) / len(records)
    metrics["completion_length"] = fmean(lengths)
    for ending in Ending:
        metrics[f"share_{ending}"] = sum(record["ending"] == ending for record in records) / len(records)
    return metrics


def _mean(values: Iterable[float | None]) -> float | None:
    given = [value for value in values if value is not None]
    return fmean(given) if given else None


def _correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Pearson's, of the pairs' first with their second numbers."""
    try:
        return correlation(*zip(*pairs, strict=True)) if len(pairs) > 1 else None
    except StatisticsError:  # one of them is constant
        return None


class Clock:
    """Seconds of a step by phase, on the process that asks."""

    def __init__(self) -> None:
        self._phases: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """End a phase, or one more part of it."""
        now = time.perf_counter()
        self._phases[phase] = self._phases.get(phase, 0.0) + now - self._last
        self._last = now

    def metrics(self, num_tokens: int) -> dict[str, float]:
        """`seconds_PHASE`, and tokens trained a second over the whole step."""
        seconds = {f"seconds_{phase}": spent for phase, spent in self._phases.items()}
        return {**seconds, "tokens_per_second": num_tokens / sum(self._phases.values())}
