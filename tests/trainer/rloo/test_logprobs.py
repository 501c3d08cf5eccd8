"""Log-probabilities and gradients, packed, with shared prompts or checkpointing, are those of one row at a time."""

import copy
import itertools

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rekatrain.trainer.rloo.logprobs import CompletionLogprobs, pack_completions

CPU = torch.device("cpu")
# Also a float64 model's logits are normalized in float32.
TOLERANCES = {torch.float64: 2e-6, torch.float32: 1e-5}

# Prompts' and completions' lengths.
LAYOUTS = {
    "variable lengths": ([5, 1, 9], [[3, 7, 1], [2, 2, 6], [1, 4, 5]]),
    "single tokens": ([4, 7], [[1, 1], [1, 1]]),
    "one group": ([6], [[2, 5, 3, 1]]),
    "one row": ([3], [[4]]),
    "groups of one": ([2, 8, 5], [[3], [1], [6]]),
    "equal lengths": ([6, 6], [[4, 4], [4, 4]]),
}
# Which groups have their prompt run once, and which with each completion.
SHARING = {"shared": itertools.repeat(True), "each": itertools.repeat(False), "mixed": itertools.cycle([True, False])}


def random_ids(lengths: list[int], num_tokens: int, generator: torch.Generator) -> list[list[int]]:
    return [torch.randint(num_tokens, (length,), generator=generator).tolist() for length in lengths]


def laid_out(layout: str, num_tokens: int) -> tuple[list[list[int]], list[list[list[int]]]]:
    generator = torch.Generator().manual_seed(1)
    prompt_lengths, completion_lengths = LAYOUTS[layout]
    prompts = random_ids(prompt_lengths, num_tokens, generator)
    return prompts, [random_ids(lengths, num_tokens, generator) for lengths in completion_lengths]


def brute_force(policy: torch.nn.Module, prompts: list, groups: list, *, temperature: float, num_tokens: int) -> Tensor:
    """Log-probabilities of all completion tokens, [T], from one plain forward for each row."""
    rows = []
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            logits = policy(torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1]
            logprobs = torch.log_softmax(logits[:, :num_tokens] / temperature, dim=1)
            rows.append(logprobs[range(len(completion)), completion])
    return torch.cat(rows)


def gradients(policy: torch.nn.Module, logprobs_T: Tensor) -> dict[str, Tensor]:
    """Gradients of a sum that weighs each token differently."""
    weights_T = torch.linspace(-1, 2, len(logprobs_T), dtype=torch.float64)
    policy.zero_grad()
    (logprobs_T.double() * weights_T).sum().backward()
    return {name: p.grad.clone() for name, p in policy.named_parameters() if p.requires_grad}


def assert_gradients_close(found: dict[str, Tensor], expected: dict[str, Tensor], *, rtol: float) -> None:
    """Each weight's gradient is right, up to `rtol` of the norm of the whole gradient."""
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm().item()
    assert norm > 0.1
    assert found.keys() == expected.keys()
    errors = {name: (found[name] - gradient).norm().item() / norm for name, gradient in expected.items()}
    assert max(errors.values()) <= rtol, errors


def assert_equal_to_brute_force(
    policy: torch.nn.Module, layout: str, num_tokens: int, temperature: float = 1.0, sharing: str = "shared"
) -> None:
    """Compare with a float64 copy of the policy that scores one row at a time."""
    prompts, groups = laid_out(layout, num_tokens)
    is_shared = list(itertools.islice(copy.copy(SHARING[sharing]), len(prompts)))
    exact = copy.deepcopy(policy).double().eval()
    expected_T = brute_force(exact, prompts, groups, temperature=temperature, num_tokens=num_tokens)

    scored = CompletionLogprobs(policy, temperature=temperature, num_tokens=num_tokens)
    logprobs_T = scored(pack_completions(prompts, groups, CPU, is_shared=is_shared))
    tolerance = TOLERANCES[next(policy.parameters()).dtype]
    assert logprobs_T.dtype == torch.float32
    torch.testing.assert_close(logprobs_T.double(), expected_T, rtol=0, atol=tolerance)
    assert_gradients_close(gradients(policy, logprobs_T), gradients(exact, expected_T), rtol=tolerance)


def with_adapter(model: LlamaForCausalLM) -> PeftModel:
    """LoRA on every linear layer, moved away from its start, where it changes nothing."""
    torch.manual_seed(3)
    policy = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return policy.to(model.dtype)


@pytest.mark.parametrize("sharing", SHARING)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logprobs_and_gradients_equal_those_of_one_row_at_a_time(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, layout: str, sharing: str
) -> None:
    assert_equal_to_brute_force(model.double(), layout, len(tokenizer), sharing=sharing)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_attention_that_a_model_was_loaded_with_makes_no_difference(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, attention: str
) -> None:
    model.double().set_attn_implementation(attention)
    assert_equal_to_brute_force(model, "variable lengths", len(tokenizer))


@pytest.mark.parametrize("layout", ["variable lengths", "one row"])
def test_logprobs_equal_those_of_a_padded_batch(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, layout: str
) -> None:
    model.double()
    num_tokens = len(tokenizer)
    prompts, groups = laid_out(layout, num_tokens)
    rows = [(prompt, row) for prompt, group in zip(prompts, groups, strict=True) for row in group]
    longest = max(len(prompt) + len(row) for prompt, row in rows)
    padding = [longest - len(prompt) - len(row) for prompt, row in rows]
    ids = torch.tensor([[0] * pad + prompt + row for pad, (prompt, row) in zip(padding, rows, strict=True)])
    mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])
    logits = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), use_cache=False).logits
    logprobs = torch.log_softmax(logits[:, :-1, :num_tokens], dim=2).gather(2, ids[:, 1:, None])[:, :, 0]
    padded_T = torch.cat([row[-len(ids) :] for row, (_, ids) in zip(logprobs, rows, strict=True)])
    padded = gradients(model, padded_T)

    for is_shared in (True, False):
        packed_T = CompletionLogprobs(model, temperature=1.0, num_tokens=num_tokens)(
            pack_completions(prompts, groups, CPU, is_shared=[is_shared] * len(prompts))
        )
        torch.testing.assert_close(packed_T.double(), padded_T, rtol=0, atol=2e-6)
        assert_gradients_close(gradients(model, packed_T), padded, rtol=2e-6)


@pytest.mark.parametrize("temperature", [0.7, 1.6])
def test_logprobs_are_those_at_the_sampling_temperature(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, temperature: float
) -> None:
    assert_equal_to_brute_force(model.double(), "variable lengths", len(tokenizer), temperature)


@pytest.mark.parametrize("sharing", ["shared", "each"])
@pytest.mark.parametrize("is_lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_activation_checkpointing_changes_no_value_and_no_gradient(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, layout: str, is_lora: bool, sharing: str
) -> None:
    policy = with_adapter(model.double()) if is_lora else model.double()
    policy.activation_checkpointing_enable()
    assert_equal_to_brute_force(policy.train(), layout, len(tokenizer), 0.7, sharing)


@pytest.mark.parametrize("is_on", [False, True])
def test_activation_checkpointing_recomputes_each_layer_in_the_backward_pass(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, is_on: bool
) -> None:
    if is_on:
        model.activation_checkpointing_enable()
    prompts, groups = laid_out("variable lengths", len(tokenizer))
    logprobs_T = CompletionLogprobs(model.train(), temperature=1.0, num_tokens=len(tokenizer))(
        pack_completions(prompts, groups, CPU)
    )
    num_calls = []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: num_calls.append(1))
    logprobs_T.sum().backward()
    assert len(num_calls) == (1 if is_on else 0)


@pytest.mark.parametrize("rows_at_once", [1, 4, 100])
@pytest.mark.parametrize("at_once", [*range(1, 12), 30, 100])
def test_logits_in_pieces_of_any_size_give_the_same_values_and_gradients(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    at_once: int,
    rows_at_once: int,
) -> None:
    monkeypatch.setattr("rekatrain.trainer.rloo.logprobs.TOKENS_PER_CHUNK", at_once)
    logit_bytes = rows_at_once * 4 * model.config.vocab_size
    monkeypatch.setattr("rekatrain.trainer.rloo.logprobs.LOGIT_BYTES_AT_ONCE", {"cpu": logit_bytes})
    assert_equal_to_brute_force(model.double(), "variable lengths", len(tokenizer), temperature=0.7)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_adapter_is_scored_and_trained_as_one_row_at_a_time(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, layout: str
) -> None:
    assert_equal_to_brute_force(with_adapter(model.double()), layout, len(tokenizer), 0.7)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32_differs_by_rounding_only(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, layout: str
) -> None:
    assert_equal_to_brute_force(model, layout, len(tokenizer), 0.7)


def test_probabilities_of_the_tokenizers_ids_sum_to_one(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    num_tokens = len(tokenizer)
    every_id = pack_completions([[5, 6, 7]], [[[token] for token in range(num_tokens)]], CPU)
    logprobs_T = CompletionLogprobs(model, temperature=0.7, num_tokens=num_tokens)(every_id)
    assert logprobs_T.double().exp().sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("sharing", [True, False])
def test_a_completion_sees_its_prompt_and_itself_alone(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, sharing: bool
) -> None:
    model.double()
    scored = CompletionLogprobs(model, temperature=1.0, num_tokens=len(tokenizer))
    prompts, groups = laid_out("variable lengths", len(tokenizer))

    def second_of_first_group() -> Tensor:
        lengths = [len(row) for row in groups[0]]
        return scored(pack_completions(prompts, groups, CPU, is_shared=[sharing] * 3))[lengths[0] : sum(lengths[:2])]

    before = second_of_first_group()
    groups[0][0], groups[0][2], groups[1:], prompts[1:] = [17, 18, 19], [23], groups[:0:-1], prompts[:0:-1]
    assert torch.equal(second_of_first_group(), before)
    prompts[0][0] += 1
    assert not torch.allclose(second_of_first_group(), before)
    groups[0][1][0] += 1
    assert not torch.allclose(second_of_first_group()[1:], before[1:])


def test_groups_lie_end_to_end_without_their_last_tokens() -> None:
    rows = pack_completions([[5, 6], [4]], [[[7], [1, 2, 3]], [[8, 9], [2]]], CPU, is_shared=[True, False])
    assert rows.input_ids.tolist() == [[5, 6, 1, 2, 4, 8, 4]]
    assert rows.layout.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 0]]
    assert rows.predictors.tolist() == [1, 1, 2, 3, 4, 5, 6]
    assert rows.targets.tolist() == [7, 1, 2, 3, 8, 9, 2]
    assert rows.lengths.tolist() == [1, 3, 2, 1]
