"""The metrics of an evaluation while a run trains: functions of its answers alone."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rekatrain.data.chat import FinishReason
from rekatrain.trainer.held_out_prompts import EvaluateConfig, HeldOut
from rekatrain.trainer.intervals import wilson_interval


def evaluation_metrics(answers: Sequence[Mapping[str, Any]], config: EvaluateConfig) -> dict[str, float | None]:
    """Return the metrics of all answers.

    eval/accuracy:           fraction of first answers whose deciding reward is exactly 1.0, of those that it grades
    eval/accuracy_low, _high: its Wilson 95 % interval
    eval/rewards/NAME/mean:  mean over all answers that have the reward
    eval/completions/mean_length, .../clipped_ratio: tokens; fraction of answers at the token limit
    """
    deciding = [answer["rewards"][config.reward] for answer in answers if answer["is_first"]]
    graded = [value for value in deciding if value is not None]
    metrics: dict[str, float | None] = {"eval/accuracy": None, "eval/accuracy_low": None, "eval/accuracy_high": None}
    if graded:
        accuracy = wilson_interval(num_right=graded.count(1.0), num_graded=len(graded))
        metrics = {
            "eval/accuracy": accuracy.accuracy,
            "eval/accuracy_low": accuracy.low,
            "eval/accuracy_high": accuracy.high,
        }
    for name in answers[0]["rewards"]:
        values = [answer["rewards"][name] for answer in answers if answer["rewards"][name] is not None]
        metrics[f"eval/rewards/{name}/mean"] = fmean(values) if values else None
    metrics["eval/completions/mean_length"] = fmean(answer["length"] for answer in answers)
    num_cut = sum(answer["finish_reason"] == FinishReason.LENGTH.value for answer in answers)
    metrics["eval/completions/clipped_ratio"] = num_cut / len(answers)
    return metrics


def metric_names(held_out: HeldOut) -> list[str]:
    """Return the names of the metrics that evaluations of these prompts have."""
    rewards = {reward.name: 1.0 for reward in held_out.rewards}
    answer = {"is_first": True, "length": 1, "finish_reason": FinishReason.STOP.value, "rewards": rewards}
    return [*evaluation_metrics([answer], held_out.config)]
