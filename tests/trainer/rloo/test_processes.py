"""Tests of trainer/rloo/step.py on several processes, which are threads here: they take the step of one process."""

import pickle
import threading
from collections.abc import Sequence
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
from rekatrain.trainer.rloo.rollouts import step_prompts
from rekatrain.trainer.rloo.setup import RunSetup
from rekatrain.trainer.rloo.step import Run, take_step
from tests.helpers.rloo import (
    TEXTS,
    Gradient,
    assert_gradients_close,
    by_completion,
    by_ids,
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
        """Return copies of the lists of all ranks end to end, as Accelerate does."""
        return [each for part in self._exchange(pickle.dumps(objects)) for each in pickle.loads(part)]

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


def test_take_step_trains_on_all_processes_what_one_sampled(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    # Only the prompts of the first process have rewards that vary: it hands one of its two groups to the second.
    order = step_prompts(4, seed=5, step=0, prompts_per_step=4)

    def vary_on_the_first(
        prompts: Sequence[str], completion_ids: Sequence[list[int]], **_: object
    ) -> list[float | None]:
        varying = [TEXTS[index] for index in order[:2]]
        pairs = zip(prompts, by_ids(completion_ids), strict=True)
        return [reward if prompt in varying else 0.5 for prompt, reward in pairs]

    setup = make_setup(tokenizer, vary_on_the_first, texts=TEXTS[:4], prompts_per_step=4, num_generations=6)
    expected = run_on_ranks(policy.double(), setup, Ranks(1))
    ranks = Ranks(2)
    records, gradient = run_on_ranks(policy, setup, ranks)
    assert_equal_steps((records, gradient), expected)
    assert {record["prompt_index"] for record in records if record["logprob"] is not None} == {0, 1}
    lengths = [
        sum(len(record["completion_ids"]) for record in records if record["prompt_index"] == index) for index in (0, 1)
    ]
    assert sorted(sum(tokens for _, tokens in passes) for passes in ranks.chunks) == sorted(lengths)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_take_step_makes_equal_passes_on_all_processes(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, beta: float
) -> None:
    # A group on each process, of other lengths: one has fewer micro-batches than the other, and fewer chunks in them.
    setup = make_setup(
        tokenizer,
        sometimes_none,
        prompts_per_step=2,
        num_generations=6,
        max_completion_length=24,
        micro_batch_tokens=60,
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
