"""Tests of trainer/rloo/step.py on several processes, which are threads here: they take the step of one process."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rekatrain.trainer.rloo.logprobs import CompletionLogprobs, PackedCompletions
from rekatrain.trainer.rloo.metrics import Clock, RolloutRecord
from rekatrain.trainer.rloo.setup import RunSetup
from rekatrain.trainer.rloo.step import Run, take_step
from tests.helpers.rloo import (
    Gradient,
    assert_gradients_close,
    by_completion,
    exact_copy,
    gradient_of,
    make_model,
    make_setup,
    perturb,
    reference_of,
    sometimes_none,
)


class Ranks:
    """Processes as `take_step` sees them, each on its own thread.

    chunks: for each rank, the number of chunks and of completion tokens of each forward pass
    """

    def __init__(self, num_processes: int) -> None:
        self.num_processes = num_processes
        self.chunks: list[list[tuple[int, int]]] = [[] for _ in range(num_processes)]
        self._barrier = threading.Barrier(num_processes, timeout=60)
        self._exchanged: dict[int, Any] = {}
        self._thread = threading.local()

    def accelerator(self, process_index: int) -> Any:  # stands in for Accelerate's
        """Make the accelerator of a rank, on its thread."""
        self._thread.rank = process_index

        def reduce(tensor: Tensor, how: str) -> Tensor:
            assert how == "sum"
            return torch.stack(self._exchange(tensor)).sum(dim=0)

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

    def gather_object(self, objects: list[Any]) -> list[Any]:
        """Return the lists of all ranks end to end, as Accelerate does."""
        return [each for part in self._exchange(objects) for each in part]

    def record(self, packed: PackedCompletions) -> None:
        """Record a forward pass of this thread's rank."""
        self.chunks[self._thread.rank].append((packed.num_chunks, len(packed.targets)))

    def abort(self) -> None:
        """Let all ranks fail that wait for each other."""
        self._barrier.abort()

    def _exchange(self, value: Any) -> list[Any]:
        self._exchanged[self._thread.rank] = value
        self._barrier.wait()
        values = [self._exchanged[rank] for rank in range(self.num_processes)]
        self._barrier.wait()
        return values


def run_on_ranks(
    policy: LlamaForCausalLM, setup: RunSetup, ranks: Ranks, start: LlamaForCausalLM | None = None
) -> tuple[list[RolloutRecord], Gradient]:
    """Take a step on several processes -> its records, and the mean of their gradients.

    start: policy of the reference; by default the policy itself
    """
    copies = [exact_copy(policy) for _ in range(ranks.num_processes)]

    def run(rank: int) -> list[RolloutRecord]:
        try:
            reference = reference_of(exact_copy(start or policy), setup) if setup.config.beta else None
            return take_step(
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
        except BaseException:
            ranks.abort()
            raise

    forward = CompletionLogprobs.forward

    def recorded(model: CompletionLogprobs, packed: PackedCompletions) -> Tensor:
        ranks.record(packed)
        return forward(model, packed)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(ranks.num_processes) as pool:
        patch.setattr("rekatrain.trainer.rloo.microbatch.gather_object", ranks.gather_object)
        patch.setattr(CompletionLogprobs, "forward", recorded)
        records = list(pool.map(run, range(ranks.num_processes)))
    gradients = [gradient_of(each) for each in copies]
    mean = {name: sum(gradient[name] for gradient in gradients) / ranks.num_processes for name in gradients[0]}
    return [record for part in records for record in part], mean


def assert_equal_steps(
    actual: tuple[list[RolloutRecord], Gradient], expected: tuple[list[RolloutRecord], Gradient]
) -> None:
    """Compare completions, advantages and gradients."""
    for record, other in zip(by_completion(expected[0]), by_completion(actual[0]), strict=True):
        assert (record["prompt_index"], record["completion_ids"]) == (other["prompt_index"], other["completion_ids"])
        assert record["advantage"] == pytest.approx(other["advantage"], abs=1e-6)
    assert_gradients_close(actual[1], expected[1], rtol=1e-6)


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
    # In float64, so that no draw depends on rounding: the processes sample other batches.
    setup = make_setup(tokenizer, sometimes_none, prompts_per_step=4, num_generations=6, **options)
    expected = run_on_ranks(policy.double(), setup, Ranks(1))
    for num_processes in (2, 4):
        assert_equal_steps(run_on_ranks(policy, setup, Ranks(num_processes)), expected)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_take_step_makes_equal_passes_on_all_processes(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, beta: float
) -> None:
    # Lengths differ between the processes: one has fewer micro-batches than the other, and fewer chunks in them.
    setup = make_setup(
        tokenizer,
        sometimes_none,
        prompts_per_step=4,
        num_generations=6,
        max_completion_length=24,
        micro_batch_tokens=100,
        beta=beta,
    )
    start = exact_copy(policy)
    perturb(policy.double())
    expected = run_on_ranks(policy, setup, Ranks(1), start)
    monkeypatch.setattr("rekatrain.trainer.rloo.logprobs.TOKENS_PER_CHUNK", 5)
    ranks = Ranks(2)
    assert_equal_steps(run_on_ranks(policy, setup, ranks, start), expected)
    num_chunks = [[chunks for chunks, _ in passes] for passes in ranks.chunks]
    assert num_chunks[0] == num_chunks[1] and max(num_chunks[0]) > 1
    assert any(chunks > num_tokens for passes in ranks.chunks for chunks, num_tokens in passes)  # some chunks are empty
