"""Tests of RunSetup.ddp_timeout in trainer/rloo/setup.py: longer than each of the run's own limits."""

from dataclasses import replace
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rekatrain.rewards.compose import build_reward_functions
from rekatrain.rewards.scoring import ScoringConfig
from rekatrain.trainer.processes.launch import USUAL_DDP_TIMEOUT
from rekatrain.trainer.rloo.sampler.vllm.server_pool import MAX_ATTEMPTS
from tests.helpers.rloo import make_setup

SERVER = {"vllm_server_base_url": "http://localhost:8000"}


def ddp_timeout(tokenizer: PreTrainedTokenizerFast, num_processes: int = 1, **options: Any) -> float:
    """Return the limit of a run of 8 prompts with 8 completions of up to 1,000 tokens and a batch function."""
    sizes = {"prompts_per_step": 8, "num_generations": 8, "max_completion_length": 1000}
    return make_setup(tokenizer, **(sizes | options)).ddp_timeout(num_processes)


def test_ddp_timeout_is_that_of_the_recipe(tokenizer: PreTrainedTokenizerFast) -> None:
    assert ddp_timeout(tokenizer, ddp_timeout=7) == 7
    assert ddp_timeout(tokenizer, ddp_timeout=7, vllm_request_timeout=9999, **SERVER) == 7


@pytest.mark.parametrize("rounds", [0, 3])
def test_ddp_timeout_exceeds_the_limits_of_the_run(tokenizer: PreTrainedTokenizerFast, rounds: int) -> None:
    options = {"dynamic_sampling_rounds": rounds, "per_device_generation_batch_size": 16}
    batch_timeout = ScoringConfig().batch_timeout
    # In process: 4 batches of 16 completions, one after the other, at 20 tokens per second.
    usual = ddp_timeout(tokenizer, **options)
    assert usual > USUAL_DDP_TIMEOUT + (1 + rounds) * (batch_timeout + 4 * 1000 / 20)
    # On four processes each has one batch.
    assert usual - ddp_timeout(tokenizer, 4, **options) > (1 + rounds) * 3 * 1000 / 20
    # With servers: an outage, then every attempt at the last of 4 batches; with a budget two requests each.
    servers = {**options, **SERVER, "vllm_server_timeout": 100.0, "vllm_request_timeout": 1000.0}
    limit = (1 + rounds) * (batch_timeout + 100 + (3 + MAX_ATTEMPTS) * 1000)
    assert ddp_timeout(tokenizer, **servers) > limit
    assert ddp_timeout(tokenizer, reasoning_budget=500, **servers) > limit + (1 + rounds) * (3 + MAX_ATTEMPTS) * 1000


def test_ddp_timeout_exceeds_the_limits_of_all_scorers(tokenizer: PreTrainedTokenizerFast) -> None:
    setup = make_setup(tokenizer, prompts_per_step=8, num_generations=8)
    scorers = build_reward_functions({"math_answer": {"timeout": 5.0}, "reasoning_format": None})
    scored = replace(setup, rewards=scorers, scoring=ScoringConfig(num_workers=4, timeout=3.0))
    bare = replace(setup, rewards=[], scoring=ScoringConfig(num_workers=4))
    assert scored.ddp_timeout(1) - bare.ddp_timeout(1) == 64 / 4 * (5 + 3)
    assert scored.ddp_timeout(2) - bare.ddp_timeout(2) == 32 / 4 * (5 + 3)
