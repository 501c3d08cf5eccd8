"""Records and metrics: one record per completion, and the metrics of a step as means over its records."""

import math
import time
from collections.abc import Iterable, Sequence
from itertools import groupby
from statistics import StatisticsError, correlation, fmean, pstdev
from typing import Any

from rekatrain.data.chat import FinishReason
from rekatrain.data.rows import Row
from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.rloo.group import Group
from rekatrain.trainer.rloo.loss import importance_weights
from rekatrain.trainer.rloo.microbatch import MicroBatch

RolloutRecord = dict[str, Any]
RATIO_NAMES = {FinishReason.STOP: "stop_ratio", FinishReason.EOS: "eos_ratio", FinishReason.LENGTH: "clipped_ratio"}
# Of a completion's importance weights: how many, their sum, the sum of their squares.
WEIGHT_SUMS = ("importance_num", "importance_sum", "importance_squares")
HEADLINE = ["reward", "kl", "completions/mean_length", "completions/clipped_ratio", "tokens_per_second"]


def batch_records(step: int, batch: MicroBatch, config: RLOOConfig) -> list[RolloutRecord]:
    """Make a JSON-ready record for each completion of a trained batch, in order; none where another process does."""
    if batch.is_copy:
        return []
    assert batch.old_logprobs is not None
    log_ratios_T = batch.old_logprobs - batch.sampler_logprobs
    values = {
        "advantage": batch.advantages,
        "kl": batch.kl,
        "logprob": batch.sums(batch.old_logprobs),
        "mismatch_kl": batch.sums(log_ratios_T.expm1() - log_ratios_T),
        "clip_ratio": batch.clip_ratio,
    }
    weights = importance_weights(batch, config)
    if weights is not None:
        powers = [weights**power for power in range(len(WEIGHT_SUMS))]
        is_by_token = str(config.importance_sampling_correction).startswith("token")
        values |= zip(WEIGHT_SUMS, map(batch.sums, powers) if is_by_token else powers, strict=True)
    columns = {name: [None] * len(batch.members) if N is None else N.tolist() for name, N in values.items()}
    return [
        _record(step, group, index, **{name: _finite(column[number]) for name, column in columns.items()})
        for number, (group, index) in enumerate(batch.members)
    ]


def idle_records(step: int, groups: Sequence[Group]) -> list[RolloutRecord]:
    """Make the records of groups that were sampled and not trained on."""
    return [
        _record(step, group, index, advantage=0.0, kl=None, logprob=None, mismatch_kl=None, clip_ratio=None)
        for group in groups
        for index in range(len(group.completions))
    ]


def _finite(value: float | None) -> float | None:
    """Return None for nan and infinity, which JSON has no numbers for."""
    return value if value is None or math.isfinite(value) else None


def count_runs(values: Sequence[int]) -> list[list[int]]:
    """Return each value and its number in a row.

    >>> count_runs([3, 3, 4])
    [[3, 2], [4, 1]]
    """
    return [[value, len(list(run))] for value, run in groupby(values)]


def _record(step: int, group: Group, index: int, **trained: float | None) -> RolloutRecord:
    completion = group.completions[index]
    reward = group.rewards[index]
    return {
        "step": step,
        "prompt_index": group.prompt_index,
        "row": group.prompt.row.where,
        "source": group.prompt.row.source.name,
        "prompt": group.prompt.text,
        "gold": gold_of(group.prompt.row),
        "completion": group.texts[index],
        "completion_ids": completion.ids,
        "num_forced": len(completion.forced),
        **({"weight_versions": count_runs(completion.versions)} if completion.versions else {}),
        "finish_reason": completion.finish_reason.value,
        "rewards": {name: values[index] for name, values in group.rewards_by_name.items()},
        "reward_errors": dict(group.reward_errors[index]),
        **_reported(group, index),
        "reward": None if math.isnan(reward) else reward,
        "sampler_logprob": sum(completion.logprobs),
        **trained,
    }


def gold_of(row: Row) -> Any:  # a JSON value
    """Return the right answer of a row: its column `answer`, or the answer of its reference response; else None."""
    if row.columns.get("answer") is not None:
        return row.columns["answer"]
    is_answered = bool(row.messages) and row.messages[-1]["role"] == "assistant"
    return row.messages[-1]["content"] if is_answered else None


def _reported(group: Group, index: int) -> dict[str, Any]:
    """Return metrics and notes of a completion's rewards, and its scaled reward, where there are any."""
    scaled = None if group.scaled_rewards is None else _finite(group.scaled_rewards[index])
    values = {
        "reward_metrics": dict(group.reward_metrics[index]) if group.reward_metrics else {},
        "reward_notes": dict(group.reward_notes[index]) if group.reward_notes else {},
        "scaled_reward": scaled,
    }
    return {name: value for name, value in values.items() if value not in ({}, None)}


def step_metrics(records: Sequence[RolloutRecord]) -> dict[str, float | int | None]:
    """Metrics of a step from the records of all its completions, whichever process they come from.

    reward/SOURCE:                   the mean of the total over the completions of one source that has a name
    reward, reward_std:              mean and standard deviation of the total over completions that have one, else None
    rewards/NAME/mean, .../std:      the same for one reward function
    rewards/NAME/not_applicable:     fraction of completions to which the reward does not apply (it returned None)
    rewards/NAME/errors:             fraction of completions on which the reward function failed
    rewards/NAME/METRIC:             the mean of a metric that the reward reports, over the completions that have it
    rewards/NAME/length_correlation: Pearson correlation with the number of tokens; None where either is constant
    frac_reward_zero_std:            fraction of groups whose scorable rewards are all equal; they teach only the KL
    kl:                              mean over completions of the KL summed over tokens, nats; None without a reference
    entropy:                         mean of -log p over the sampled tokens, nats per token
    mismatch_logprob:                mean over trained completions of |sampler's log p - trainer's log p|, nats
    mismatch_kl:                     KL of the trainer's distribution from the sampler's, nats per token (k3 estimate)
    clip_ratio:                      fraction of importance ratios that the last update clipped
    importance/mean_weight:          mean of the importance weights, per token or per sequence as the correction is
    importance/effective_sample_size: (sum of the weights)^2 / (their number * sum of their squares), 1 if all are equal
    staleness, staleness/max:        updates since the weights that drew a token, mean and maximum over tokens; servers
    completions/mean_length:         tokens
    completions/stop_ratio, .../eos_ratio, .../clipped_ratio: fraction that ended at `<sep>`, eos, the cap
    completions/forced_ratio:        fraction whose reasoning was closed by the reasoning budget
    """
    lengths = [len(record["completion_ids"]) for record in records]
    rewards = [record["reward"] for record in records if record["reward"] is not None]
    groups: dict[int, set[float]] = {record["prompt_index"]: set() for record in records}
    for record in records:
        if record["reward"] is not None:
            groups[record["prompt_index"]].add(record["reward"])
    metrics: dict[str, float | int | None] = {
        "reward": _mean(rewards),
        "reward_std": pstdev(rewards) if rewards else None,
    }
    by_source: dict[str, list[float | None]] = {}
    for record in records:
        by_source.setdefault(record.get("source", ""), []).append(record["reward"])
    metrics.update({f"reward/{source}": _mean(values) for source, values in sorted(by_source.items()) if source})
    for name in records[0]["rewards"]:
        values = [record["rewards"][name] for record in records]
        num_failed = sum(name in record["reward_errors"] for record in records)
        given = [(value, length) for value, length in zip(values, lengths, strict=True) if value is not None]
        reported = [record.get("reward_metrics", {}).get(name, {}) for record in records]
        for key in sorted({key for of_record in reported for key in of_record}):
            metrics[f"rewards/{name}/{key}"] = _mean(of_record.get(key) for of_record in reported)
        metrics[f"rewards/{name}/mean"] = _mean(values)
        metrics[f"rewards/{name}/std"] = pstdev([value for value, _ in given]) if given else None
        metrics[f"rewards/{name}/not_applicable"] = (values.count(None) - num_failed) / len(records)
        metrics[f"rewards/{name}/errors"] = num_failed / len(records)
        metrics[f"rewards/{name}/length_correlation"] = _correlation(given)
    metrics["frac_reward_zero_std"] = sum(len(different) <= 1 for different in groups.values()) / len(groups)
    metrics["kl"] = _mean(record["kl"] for record in records)
    num_drawn = sum(lengths) - sum(record["num_forced"] for record in records)
    metrics["entropy"] = -sum(record["sampler_logprob"] for record in records) / num_drawn
    metrics["mismatch_logprob"] = _mean(
        abs(record["sampler_logprob"] - record["logprob"]) for record in records if record["logprob"] is not None
    )
    trained = [record for record in records if record["mismatch_kl"] is not None]
    num_trained = sum(len(record["completion_ids"]) - record["num_forced"] for record in trained)
    metrics["mismatch_kl"] = sum(record["mismatch_kl"] for record in trained) / num_trained if num_trained else None
    metrics["clip_ratio"] = _mean(record["clip_ratio"] for record in trained)
    metrics |= {**_importance(trained), **_staleness(records)}
    metrics["completions/forced_ratio"] = sum(record["num_forced"] > 0 for record in records) / len(records)
    metrics["completions/mean_length"] = fmean(lengths)
    for finish_reason, name in RATIO_NAMES.items():
        metrics[f"completions/{name}"] = sum(r["finish_reason"] == finish_reason for r in records) / len(records)
    return metrics


def _importance(trained: Sequence[RolloutRecord]) -> dict[str, float]:
    weighted = [record for record in trained if record.get("importance_num")]
    num, total, squares = (sum(record[name] for record in weighted) for name in WEIGHT_SUMS)
    if not squares:
        return {}
    size = min(total**2 / (num * squares), 1.0)  # not above 1 by rounding
    return {"importance/mean_weight": total / num, "importance/effective_sample_size": size}


def _staleness(records: Sequence[RolloutRecord]) -> dict[str, float]:
    runs = [
        (record["step"] - 1 - version, num) for record in records for version, num in record.get("weight_versions", [])
    ]
    if not runs:
        return {}
    mean = sum(age * num for age, num in runs) / sum(num for _, num in runs)
    return {"staleness": mean, "staleness/max": max(age for age, _ in runs)}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Pearson's correlation of the first numbers with the second; None where it is undefined."""
    try:
        return correlation(*zip(*pairs, strict=True)) if len(pairs) > 1 else None
    except StatisticsError:  # one of them is constant
        return None


class Clock:
    """Seconds of a step by phase, on this process."""

    def __init__(self) -> None:
        self._phases: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """End a phase; a phase that ends several times adds up."""
        now = time.perf_counter()
        self._phases[phase] = self._phases.get(phase, 0.0) + now - self._last
        self._last = now

    def metrics(self, num_tokens: int) -> dict[str, float]:
        """`time/PHASE` in seconds, and tokens trained a second over the whole step."""
        seconds = {f"time/{phase}": spent for phase, spent in self._phases.items()}
        return {**seconds, "tokens_per_second": num_tokens / sum(self._phases.values())}
