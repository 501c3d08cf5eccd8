"""Options of a step against their formulas, worked out from its records in float64; all are off by default."""

import math
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rekatrain.data.errors import InputError
from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.rloo.metrics import Clock, RolloutRecord
from rekatrain.trainer.rloo.setup import RunSetup
from rekatrain.trainer.rloo.step import Run, take_step
from tests.helpers.rloo import (
    Gradient,
    advantages_by_hand,
    assert_gradients_close,
    by_completion,
    exact_copy,
    gradient_from_records,
    gradient_of,
    gradient_of_terms,
    make_model,
    make_setup,
    perturb,
    reference_of,
    run_step,
    sequence_logprob,
    sometimes_none,
    with_adapter,
)


def test_rloo_config_defaults_are_the_papers() -> None:
    config = RLOOConfig(max_steps=1)
    assert (config.num_iterations, config.loss_type, config.kl_placement) == (1, "sequence_sum", "reward")
    assert (config.truncated_completions, config.dynamic_sampling_rounds, config.top_p) == ("keep", 0, 1.0)
    for key in ("importance_sampling_correction", "overlong_buffer", "grad_norm_quantile", "top_k", "reasoning_budget"):
        assert getattr(config, key) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"kl_placement": "loss", "num_iterations": 2},
            "rloo.kl_placement loss is exact only on policy, and rloo.num_iterations is 2: set num_iterations to 1",
        ),
        ({"importance_sampling_correction": "token_truncate"}, "rloo.importance_sampling_correction token_truncate"),
        ({"overlong_buffer": 512}, "rloo.overlong_buffer (512) must be smaller than rloo.max_completion_length (512)"),
        ({"reasoning_budget": 600}, "rloo.reasoning_budget (600) must be smaller than rloo.max_completion_length"),
        ({"top_p": 0.9, "num_iterations": 2}, "rloo.top_p and rloo.top_k need num_iterations 1"),
        ({"top_k": 5, "num_iterations": 2}, "rloo.top_p and rloo.top_k need num_iterations 1"),
        ({"num_generations": 100}, "rloo.per_device_generation_batch_size (64) must hold at least one group"),
    ],
)
def test_rloo_config_rejects_wrong_combinations(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        RLOOConfig(max_steps=1, **settings)
    assert str(caught.value).startswith(message)


# What a completion counts for


def loss_weights(loss_type: str, records: list[RolloutRecord]) -> Callable[[RolloutRecord], float]:
    """What a record's sum over tokens counts for, by the definition of the loss, among those in the loss."""
    num_completions, num_tokens = len(records), sum(len(record["completion_ids"]) for record in records)
    return {
        "sequence_sum": lambda _: 1 / num_completions,
        "sequence_mean": lambda record: 1 / num_completions / len(record["completion_ids"]),
        "token_mean": lambda _: 1 / num_tokens,
    }[loss_type]


@pytest.mark.parametrize("level", ["sequence", "token"])
@pytest.mark.parametrize("budget", [1, 150, 10**6])
@pytest.mark.parametrize("loss_type", ["sequence_sum", "sequence_mean", "token_mean"])
def test_take_step_divides_by_the_counts_of_the_whole_step(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, loss_type: str, budget: int, level: str
) -> None:
    setup = make_setup(
        tokenizer,
        sometimes_none,
        loss_type=loss_type,
        micro_batch_tokens=budget,
        importance_sampling_level=level,
    )
    records, gradient = run_step(policy, setup)
    weight = loss_weights(loss_type, [record for record in records if record["reward"] is not None])
    expected = gradient_of_terms(
        policy, setup, records, lambda record, logprobs_T: -record["advantage"] * weight(record) * logprobs_T.sum()
    )
    assert_gradients_close(gradient, {name: value for name, value in expected.items()})


class Ranks:
    """Processes as `take_step` sees them, each on a thread of its own."""

    def __init__(self, num_processes: int) -> None:
        self.num_processes = num_processes
        self._barrier = threading.Barrier(num_processes, timeout=60)
        self._given: dict[int, Tensor] = {}

    def accelerator(self, process_index: int) -> Any:  # stands in for Accelerate's
        def reduce(tensor: Tensor, how: str) -> Tensor:
            assert how == "sum"
            self._given[process_index] = tensor
            self._barrier.wait()
            total = torch.stack([self._given[rank] for rank in range(self.num_processes)]).sum(dim=0)
            self._barrier.wait()
            return total

        return SimpleNamespace(
            num_processes=self.num_processes,
            process_index=process_index,
            distributed_type=DistributedType.MULTI_CPU,
            device=torch.device("cpu"),
            unwrap_model=lambda model: model,
            no_sync=lambda model: nullcontext(),
            backward=lambda loss: loss.backward(),
            reduce=reduce,
        )


def run_on_ranks(policy: LlamaForCausalLM, setup: RunSetup, num_processes: int) -> tuple[list[RolloutRecord], Gradient]:
    """Records of a step on several processes, and the mean of their gradients."""
    ranks = Ranks(num_processes)
    copies = [exact_copy(policy) for _ in range(num_processes)]
    records: list[list[RolloutRecord]] = [[] for _ in range(num_processes)]

    def run(rank: int) -> None:
        reference = reference_of(exact_copy(policy), setup) if setup.config.beta else None
        records[rank] = take_step(
            Run.in_process(
                ranks.accelerator(rank),
                make_model(copies[rank], setup),
                replace(setup, seed=5),
                setup.make_sampler(copies[rank]),
                lambda: None,
                reference,
            ),
            step=0,
            clock=Clock(),
        )

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(num_processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    gradients = [gradient_of(each) for each in copies]
    mean = {name: sum(gradient[name] for gradient in gradients) / num_processes for name in gradients[0]}
    return [record for part in records for record in part], mean


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"beta": 0.3},
        {"loss_type": "sequence_mean", "truncated_completions": "drop_from_loss"},
        {"loss_type": "token_mean", "truncated_completions": "drop_from_group"},
        {"dynamic_sampling_rounds": 2},
        {"beta": 0.3, "kl_placement": "loss"},
    ],
    ids=["default", "kl", "sequence mean", "token mean", "dynamic", "k2"],
)
def test_take_step_on_many_processes_equals_one(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, options: dict[str, Any]
) -> None:
    # In float64, so that no draw hangs on rounding: the processes sample other batches.
    setup = make_setup(tokenizer, sometimes_none, prompts_per_step=4, num_generations=6, **options)
    records, expected = run_on_ranks(policy.double(), setup, 1)
    for num_processes in (2, 4):
        others, gradient = run_on_ranks(policy, setup, num_processes)
        for record, other in zip(by_completion(records), by_completion(others), strict=True):
            assert (record["prompt_index"], record["completion_ids"]) == (
                other["prompt_index"],
                other["completion_ids"],
            )
            assert record["advantage"] == pytest.approx(other["advantage"], abs=1e-6)
        assert_gradients_close(gradient, expected, rtol=1e-6)


# Truncated and long completions


def is_cut(record: RolloutRecord) -> bool:
    return record["finish_reason"] == "length"


def full_reward(record: RolloutRecord) -> float:
    """What `by_ids` gives at its weight of 2."""
    return 2 * (sum(record["completion_ids"]) % 7 / 7)


def test_take_step_keeps_truncated_completions_by_default(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    records, gradient = run_step(policy, make_setup(tokenizer))
    assert 3 < sum(map(is_cut, records)) < 17
    assert [record["reward"] for record in records] == pytest.approx([full_reward(record) for record in records])
    assert list(records[0]["rewards"]) == ["reward"]
    assert_gradients_close(gradient, gradient_from_records(policy, make_setup(tokenizer), records))


def test_take_step_penalizes_truncated_completions(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    setup = make_setup(tokenizer, truncated_completions="penalize", truncation_penalty=0.3)
    records, gradient = run_step(policy, setup)
    assert [record["reward"] for record in records] == pytest.approx(
        [full_reward(record) - 0.3 * is_cut(record) for record in records]
    )
    assert [record["rewards"]["truncation_penalty"] for record in records] == [
        -0.3 if is_cut(record) else 0.0 for record in records
    ]
    assert [record["advantage"] for record in records] == pytest.approx(advantages_by_hand(records), abs=1e-6)
    assert_gradients_close(gradient, gradient_from_records(policy, setup, records))


@pytest.mark.parametrize("loss_type", ["sequence_sum", "token_mean"])
def test_take_step_drops_truncated_completions_from_the_loss(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, loss_type: str
) -> None:
    setup = make_setup(tokenizer, truncated_completions="drop_from_loss", loss_type=loss_type)
    records, gradient = run_step(policy, setup)
    assert [record["reward"] for record in records] == pytest.approx([full_reward(record) for record in records])
    expected = [
        0.0 if is_cut(record) else advantage
        for record, advantage in zip(records, advantages_by_hand(records), strict=True)
    ]
    assert [record["advantage"] for record in records] == pytest.approx(expected, abs=1e-6)
    weight = loss_weights(loss_type, [record for record in records if not is_cut(record)])
    term = gradient_of_terms(
        policy, setup, records, lambda record, logprobs_T: -record["advantage"] * weight(record) * logprobs_T.sum()
    )
    assert_gradients_close(gradient, term)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_take_step_drops_truncated_completions_from_the_group(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, beta: float
) -> None:
    setup = make_setup(tokenizer, truncated_completions="drop_from_group", beta=beta)
    reference = reference_of(policy, setup) if beta else None
    perturb(policy)
    records, gradient = run_step(policy, setup, reference)
    assert [record["reward"] is None for record in records] == [is_cut(record) for record in records]
    assert [record["rewards"]["reward"] for record in records] == pytest.approx(
        [full_reward(record) / 2 for record in records]
    )
    assert [record["advantage"] for record in records] == pytest.approx(advantages_by_hand(records, beta), abs=1e-5)
    assert_gradients_close(gradient, gradient_from_records(policy, setup, records))


def test_take_step_skips_groups_of_truncated_completions(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    for how in ("drop_from_loss", "drop_from_group"):
        setup = make_setup(tokenizer, truncated_completions=how, max_completion_length=1)
        records, gradient = run_step(policy, setup)
        cut_slots = [
            prompt_index
            for prompt_index in range(1, 5)
            if all(is_cut(r) for r in records if r["prompt_index"] == prompt_index)
        ]
        assert len(cut_slots) > 1
        assert all(record["logprob"] is None for record in records if record["prompt_index"] in cut_slots)
        assert all(torch.isfinite(value).all() for value in gradient.values())


def test_take_step_adds_the_overlong_penalty(policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    setup = make_setup(tokenizer, overlong_buffer=4, overlong_penalty=0.5)
    records, gradient = run_step(policy, setup)
    penalties = {length: 0.0 for length in range(1, 5)} | {5: -0.125, 6: -0.25, 7: -0.375, 8: -0.5}
    assert [record["rewards"]["overlong_penalty"] for record in records] == [
        penalties[len(record["completion_ids"])] for record in records
    ]
    assert [record["reward"] for record in records] == pytest.approx(
        [full_reward(record) + record["rewards"]["overlong_penalty"] for record in records]
    )
    assert len({record["rewards"]["overlong_penalty"] for record in records}) > 2
    assert [record["advantage"] for record in records] == pytest.approx(advantages_by_hand(records), abs=1e-6)
    assert_gradients_close(gradient, gradient_from_records(policy, setup, records))


# The KL in the loss


@pytest.mark.parametrize("is_lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("budget", [40, 10**6])
def test_take_step_with_kl_in_the_loss_adds_the_k2_term(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, budget: int, is_lora: bool
) -> None:
    beta = 0.3
    initial = exact_copy(policy)
    trained = with_adapter(policy) if is_lora else policy
    setup = make_setup(tokenizer, sometimes_none, beta=beta, kl_placement="loss", micro_batch_tokens=budget)
    reference = reference_of(trained, setup)
    perturb(trained)
    records, gradient = run_step(trained, setup, reference)
    assert [record["advantage"] for record in records] == pytest.approx(advantages_by_hand(records), abs=1e-6)
    num_scorable = sum(record["reward"] is not None for record in records)
    kls = []

    def term(record: RolloutRecord, logprobs_T: Tensor) -> Tensor:
        log_ratio = logprobs_T.sum() - sequence_logprob(initial, setup, record).detach()
        kls.append(log_ratio.item())
        penalty = beta / 2 * log_ratio**2 if record["reward"] is not None else 0.0
        return (-record["advantage"] * logprobs_T.sum() + penalty) / num_scorable

    assert_gradients_close(gradient, gradient_of_terms(trained, setup, records, term))
    assert [record["kl"] for record in records] == pytest.approx(kls, abs=1e-4)
    assert max(map(abs, kls)) > 0.1
    assert math.isfinite(sum(kls))
