"""Tests of trainer/rloo/metrics.py: the metrics of a step follow from its records."""

import math
import re
from typing import Any

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rekatrain.trainer.rloo.metrics import RolloutRecord, step_metrics
from tests.helpers.rloo import for_some_prompts, make_setup, run_step


def record(prompt_index: int, rewards: dict[str, float | None], reward: float | None, **others: Any) -> RolloutRecord:
    """Make a record with defaults for the fields in `others`."""
    defaults = {"completion_ids": [1, 2], "num_forced": 0, "finish_reason": "stop", "kl": None, "logprob": -2.0}
    defaults |= {"sampler_logprob": -2.0, "mismatch_kl": 0.0, "clip_ratio": 0.0}
    defaults |= {"reward_errors": {}}
    return {"prompt_index": prompt_index, "rewards": rewards, "reward": reward, **defaults, **others}


IDLE = {"kl": None, "logprob": None, "mismatch_kl": None, "clip_ratio": None}


def test_step_metrics_worked_out_by_hand() -> None:
    a_1 = {"a": 1.0, "b": None}
    records = [
        record(0, a_1, 1.0, kl=0.5, completion_ids=[1, 2, 3], sampler_logprob=-6.0, logprob=-6.5, mismatch_kl=0.25),
        record(0, {"a": 0.0, "b": 2.0}, 4.0, kl=-0.25, finish_reason="eos", completion_ids=[1], sampler_logprob=-1.0),
        record(1, a_1, 1.0, finish_reason="length", **IDLE | {"kl": 1.0}),
        record(1, {"a": None, "b": None}, None, sampler_logprob=-3.0, reward_errors={"b": "no result"}, **IDLE),
        record(2, a_1, 1.0, kl=0.75, completion_ids=[1, 2, 3, 4], num_forced=2, clip_ratio=1.0, mismatch_kl=0.15),
        record(2, a_1, 1.0, kl=0.0, logprob=-2.25, clip_ratio=0.5),
    ]
    assert step_metrics(records) == pytest.approx(
        {
            "reward": 8 / 5,  # of 1, 4, 1, 1, 1
            "reward_std": 1.2,
            "rewards/a/mean": 4 / 5,
            "rewards/a/std": 0.4,
            "rewards/a/not_applicable": 1 / 6,
            "rewards/a/errors": 0,
            # Of 1, 0, 1, 1, 1 with 3, 1, 2, 4, 2 tokens: the covariance over both deviations, all times 5.
            "rewards/a/length_correlation": 1.4 / math.sqrt(5.2 * 0.8),
            "rewards/b/mean": 2.0,
            "rewards/b/std": 0,
            "rewards/b/not_applicable": 4 / 6,
            "rewards/b/errors": 1 / 6,
            "rewards/b/length_correlation": None,
            "frac_reward_zero_std": 2 / 3,  # a group with one scorable completion counts too
            "kl": 2 / 5,
            "entropy": 16 / 12,  # over drawn tokens only, not forced ones
            "mismatch_logprob": (0.5 + 1.0 + 0.0 + 0.25) / 4,
            "mismatch_kl": 0.4 / 8,
            "clip_ratio": 1.5 / 4,
            "completions/forced_ratio": 1 / 6,
            "completions/mean_length": 14 / 6,
            "completions/stop_ratio": 4 / 6,
            "completions/eos_ratio": 1 / 6,
            "completions/clipped_ratio": 1 / 6,
        }
    )


def test_step_metrics_without_values_are_none() -> None:
    metrics = step_metrics([record(0, {"a": None}, None, **IDLE), record(0, {"a": None}, None, **IDLE)])
    assert [name for name, value in metrics.items() if value is None] == [
        "reward",
        "reward_std",
        "rewards/a/mean",
        "rewards/a/std",
        "rewards/a/length_correlation",
        "kl",
        "mismatch_logprob",
        "mismatch_kl",
        "clip_ratio",
    ]
    assert metrics["rewards/a/not_applicable"] == 1
    assert metrics["frac_reward_zero_std"] == 1


@pytest.mark.parametrize(
    ("rewards", "is_zero_variance"),
    [([1, 1, 1], True), ([1, 0, 1], False), ([None, None, None], True), ([1, 1, None], True), ([1, None, 0], False)],
)
def test_step_metrics_count_groups_of_equal_rewards(rewards: list[float | None], is_zero_variance: bool) -> None:
    metrics = step_metrics([record(0, {"a": reward}, reward) for reward in rewards])
    assert metrics["frac_reward_zero_std"] == is_zero_variance


def test_step_metrics_follow_from_the_records_of_a_step(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    records, _ = run_step(policy, make_setup(tokenizer, for_some_prompts))
    metrics = step_metrics(records)
    assert metrics["frac_reward_zero_std"] == pytest.approx(3 / 5)
    assert metrics["mismatch_logprob"] < 1e-4
    assert metrics["reward"] == pytest.approx(sum(record["reward"] for record in records) / 20)
    assert re.fullmatch(r"prompts\.jsonl:[1-5]", records[0]["row"])
