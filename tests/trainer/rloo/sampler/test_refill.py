"""Groups that join a running batch, and tokens that are read late, give the completions of one batch."""

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rekatrain.data.chat import FinishReason, encode_text
from rekatrain.trainer.rloo.kernels.grouped_attention import FIRST_ROOM
from rekatrain.trainer.rloo.sampler.in_process import Completion, Sampler

TEXTS = [
    "human: What is 2+2? <sep> assistant:",
    "a",
    "human: 17 + 25 = <sep> assistant:",
    "Be brief.",
    "human:",
    "x y z",
]
KEYS = [(3, 0, prompt_index) for prompt_index in range(len(TEXTS))]
# Completions of about ten tokens, a few above the room that the cache has at first.
LENGTH = FIRST_ROOM + 20


@pytest.fixture
def policy(ending_model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A policy in float64, so that no draw depends on rounding; some completions are long."""
    model = ending_model.double()
    with torch.no_grad():
        model.lm_head.weight[:, 0] *= 0.5
        model.lm_head.weight[model.config.eos_token_id, 0] = 1.5
    return model


def sample(
    policy: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    batch_size: int,
    *,
    num_late: int = 0,
    seen: dict[int, Completion] | None = None,
    **options: float,
) -> list[Completion]:
    settings = {"max_completion_length": LENGTH, "temperature": 0.9, **options}
    sampler = Sampler(policy, tokenizer, batch_size=batch_size, **settings)
    sampler.num_late = num_late
    prompts = [encode_text(text, tokenizer) for text in TEXTS]

    def record(index: int, completion: Completion) -> None:
        assert seen is not None and index not in seen
        seen[index] = completion

    groups = sampler.sample(prompts, KEYS, 3, None if seen is None else record)
    return [completion for group in groups for completion in group]


def assert_same(completions: list[Completion], expected: list[Completion]) -> None:
    for one, other in zip(completions, expected, strict=True):
        assert (one.ids, one.finish_reason, one.forced) == (other.ids, other.finish_reason, other.forced)
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-6)
        assert one.cutoffs == pytest.approx(other.cutoffs, abs=1e-6)


@pytest.mark.parametrize(("batch_size", "num_late"), [(3, 0), (7, 3), (6, 200), (12, 1), (64, 3)])
def test_sampler_refills_and_reads_late_without_effect(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, batch_size: int, num_late: int
) -> None:
    expected = sample(policy, tokenizer, 64)
    lengths = [len(completion.ids) for completion in expected]
    assert min(lengths) < 10 and max(lengths) > FIRST_ROOM
    seen: dict[int, Completion] = {}
    assert_same(sample(policy, tokenizer, batch_size, num_late=num_late, seen=seen), expected)
    ended = {index for index, one in enumerate(expected) if one.finish_reason != FinishReason.LENGTH}
    assert seen.keys() == ended and all(seen[index].ids == expected[index].ids for index in ended)


@pytest.mark.parametrize(
    "options", [{"top_p": 0.9, "top_k": 40}, {"reasoning_budget": 5}, {"max_completion_length": 1}]
)
def test_sampler_refills_with_filters_and_forced_tokens(
    policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, options: dict[str, float]
) -> None:
    expected = sample(policy, tokenizer, 64, **options)
    assert_same(sample(policy, tokenizer, 6, num_late=3, **options), expected)


def test_sampler_refills_so_that_few_rows_wait(policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    calls: list[int] = []
    policy.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    lengths = [len(completion.ids) for completion in sample(policy, tokenizer, 64)]
    calls.clear()
    sample(policy, tokenizer, 6)
    # Two groups at a time that wait for their longest: a prefill and a step per further token, for each pair of groups.
    waiting = sum(max(lengths[first : first + 6]) for first in range(0, len(lengths), 6))
    assert len(calls) < 0.9 * waiting
