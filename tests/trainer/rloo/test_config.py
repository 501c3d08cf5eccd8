"""Tests of trainer/rloo/config.py: defaults, and options that do not go together."""

from typing import Any

import pytest

from rekatrain.data.errors import InputError
from rekatrain.trainer.rloo.config import RLOOConfig


def test_rloo_config_defaults_are_the_papers() -> None:
    config = RLOOConfig(max_steps=1)
    assert (config.num_iterations, config.loss_type, config.kl_placement) == (1, "sequence_sum", "reward")
    assert (config.truncated_completions, config.dynamic_sampling_rounds, config.top_p) == ("keep", 0, 1.0)
    for key in ("importance_sampling_correction", "overlong_buffer", "grad_norm_quantile", "top_k", "reasoning_budget"):
        assert getattr(config, key) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"kl_placement": "loss", "num_iterations": 2},
            "rloo.kl_placement loss is exact only on policy, and rloo.num_iterations is 2: set num_iterations to 1",
        ),
        ({"importance_sampling_correction": "token_truncate"}, "rloo.importance_sampling_correction token_truncate"),
        ({"importance_sampling_correction": "token_mask"}, "rloo.importance_sampling_correction token_mask"),
        ({"max_staleness": 4}, "rloo.max_staleness 4 needs vLLM servers"),
        (
            {"max_staleness": 4, "vllm_server_base_url": "http://localhost:8000"},
            "rloo.max_staleness 4 trains on completions of older weights: set importance_sampling_correction",
        ),
        ({"rollout_dtype": "bfloat16"}, "rloo.rollout_dtype bfloat16 samples in process with other probabilities"),
        (
            {
                "rollout_dtype": "bfloat16",
                "importance_sampling_correction": "sequence_truncate",
                "vllm_server_base_url": "http://localhost:8000",
            },
            "rloo.rollout_dtype bfloat16 samples in process with other probabilities",
        ),
        ({"overlong_buffer": 512}, "rloo.overlong_buffer (512) must be smaller than rloo.max_completion_length (512)"),
        ({"reasoning_budget": 600}, "rloo.reasoning_budget (600) must be smaller than rloo.max_completion_length"),
        ({"top_p": 0.9, "num_iterations": 2}, "rloo.top_p and rloo.top_k need num_iterations 1"),
        ({"top_k": 5, "num_iterations": 2}, "rloo.top_p and rloo.top_k need num_iterations 1"),
        ({"num_generations": 100}, "rloo.per_device_generation_batch_size (64) must hold at least one group"),
    ],
)
def test_rloo_config_rejects_wrong_combinations(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        RLOOConfig(max_steps=1, **options)
    assert str(caught.value).startswith(message)
