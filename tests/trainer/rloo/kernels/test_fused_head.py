"""`rloo.fused_lm_head`: TRL's function gives the values and gradients of the default, to a stated rounding."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rekatrain.data.errors import InputError
from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.rloo.kernels.float32_head import Float32Linear, compute_head_in_float32
from rekatrain.trainer.rloo.kernels.fused_head import check_head, check_head_targets, fused_logprobs
from rekatrain.trainer.rloo.logprobs import CompletionLogprobs, TokenLogprobs, make_reference, pack_completions
from tests.helpers.rloo import with_adapter

PACKED = pack_completions([[5, 6, 7], [4]], [[[9, 10], [11, 2]], [[12, 13, 14], [15]]], torch.device("cpu"))
ROUNDING = 2.0**-8  # of bfloat16
# p of the targets. Above 0.999 the error of a float32 log-probability, about 1e-6, shows in 1 - p.
PROBABILITIES = [0.001, 0.5, 0.9, 0.99, 0.995, 0.999]


def gradients_of(policy: nn.Module, logprobs_T: Tensor) -> dict[str, Tensor]:
    """Differentiate a sum that weights each token differently."""
    policy.zero_grad()
    (logprobs_T * torch.linspace(-1, 2, len(logprobs_T))).sum().backward()
    return {name: weight.grad.clone() for name, weight in policy.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("rows_per_tile", [7, 10**6])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("is_lora", [False, True], ids=["full", "lora"])
def test_fused_head_equals_the_default(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    is_lora: bool,
    temperature: float,
    rows_per_tile: int,
) -> None:
    # The model has more rows than the tokenizer has ids: the last ones get no probability and no gradient.
    monkeypatch.setattr("rekatrain.trainer.rloo.kernels.fused_head.ROWS_PER_TILE", rows_per_tile)
    policy = with_adapter(model) if is_lora else model
    num_tokens = len(tokenizer) - 3
    scored = CompletionLogprobs(policy, temperature=temperature, num_tokens=num_tokens)
    expected_T = scored(PACKED)
    expected = gradients_of(policy, expected_T)
    scored = CompletionLogprobs(policy, temperature=temperature, num_tokens=num_tokens, fused_lm_head=True)
    logprobs_T = scored(PACKED)
    torch.testing.assert_close(logprobs_T, expected_T, rtol=0, atol=3e-6)
    actual = gradients_of(policy, logprobs_T)
    assert actual.keys() == expected.keys()
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert all((actual[name] - gradient).norm() <= 3e-6 * norm for name, gradient in expected.items())
    if not is_lora:
        head = model.lm_head.weight
        assert head.grad[num_tokens:].abs().max() == 0 or head is model.model.embed_tokens.weight


def sure_tokens(
    dtype: torch.dtype, temperature: float, num_tokens: int, num_rows: int, hidden_size: int = 64
) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden states, a head's weight and targets, so that the targets have the probabilities above."""
    generator = torch.Generator().manual_seed(0)
    num = len(PROBABILITIES)
    targets_T = torch.randperm(num_tokens, generator=generator)[:num]
    hidden_TD = torch.randn(num, hidden_size, generator=generator).double()
    weight_VD = torch.randn(num_rows, hidden_size, generator=generator).double() / 8
    for hidden_D, target, probability in zip(hidden_TD, targets_T, PROBABILITIES, strict=True):
        direction_D, low, high = weight_VD[target].clone(), -300.0, 300.0
        start_D = hidden_D.clone()
        for _ in range(60):
            middle = (low + high) / 2
            hidden_D.copy_(start_D + middle * direction_D)
            is_low = torch.softmax(weight_VD[:num_tokens] @ hidden_D / temperature, 0)[target] < probability
            low, high = (middle, high) if is_low else (low, middle)
    return hidden_TD.to(dtype), weight_VD.to(dtype), targets_T


def assert_exact_for_sure_tokens(dtype: torch.dtype, temperature: float) -> None:
    """Compare values and gradients with float64 of the same hidden states and weights."""
    num_tokens = 1000
    hidden_TD, weight_VD, targets_T = sure_tokens(dtype, temperature, num_tokens, 1024)
    weights_T = torch.linspace(-1, 2, len(targets_T)) + 0.1
    exact_TD, exact_VD = hidden_TD.double().requires_grad_(), weight_VD.double().requires_grad_()
    logits_TV = exact_TD @ exact_VD.T
    expected_T = torch.log_softmax(logits_TV[:, :num_tokens] / temperature, 1).gather(1, targets_T[:, None])[:, 0]
    (expected_T * weights_T).sum().backward()
    assert expected_T.exp().max() > 0.998

    def errors(logprobs_T: Tensor, hidden_TD: Tensor, weight_VD: Tensor) -> tuple[float, float, float]:
        (logprobs_T * weights_T).sum().backward()
        per_token_T = (hidden_TD.grad - exact_TD.grad).norm(dim=1) / exact_TD.grad.norm(dim=1)
        of_weight = (weight_VD.grad - exact_VD.grad).norm() / exact_VD.grad.norm()
        return (logprobs_T - expected_T).abs().max().item(), per_token_T.max().item(), of_weight.item()

    head = nn.Linear(*reversed(weight_VD.shape), bias=False, dtype=dtype)
    head.weight = nn.Parameter(weight_VD.clone())
    hidden = hidden_TD.clone().requires_grad_()
    logprobs_T = fused_logprobs(head, hidden, targets_T, temperature=temperature, num_tokens=num_tokens)
    fused = errors(logprobs_T, hidden, head.weight)
    hidden, weight = hidden_TD.clone().requires_grad_(), weight_VD.clone().requires_grad_()
    logprobs_T = TokenLogprobs.apply(hidden @ weight.T, targets_T, None, temperature, num_tokens, 4)
    default = errors(logprobs_T, hidden, weight)
    assert head.weight.grad[num_tokens:].abs().max() == 0
    if dtype == torch.float32:
        assert fused[0] <= 1e-5 and fused[1] <= 1e-2 and fused[2] <= 1e-4
    else:  # the logits are rounded alike
        assert all(ours <= 1.05 * theirs + 1e-4 for ours, theirs in zip(fused, default, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_head_is_right_for_sure_tokens(dtype: torch.dtype, temperature: float) -> None:
    assert_exact_for_sure_tokens(dtype, temperature)


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_fused_head_is_right_for_sure_tokens_by_its_kernel() -> None:
    # Triton's interpreter runs the GPU's kernel on a CPU. It cuts bfloat16 off where a GPU rounds: float32 alone.
    script = (
        "import torch\n"
        "from trl.kernels import chunked_logprob\n"
        "chunked_logprob._use_triton = lambda device: True\n"
        "from tests.trainer.rloo.kernels.test_fused_head import assert_exact_for_sure_tokens\n"
        "for temperature in (1.0, 0.7):\n"
        "    assert_exact_for_sure_tokens(torch.float32, temperature)\n"
        "print(type(chunked_logprob._forward_kernel).__module__)\n"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "triton.runtime" in run.stdout


def test_fused_head_is_that_of_the_reference_and_in_float32(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    compute_head_in_float32(model.bfloat16())
    config = RLOOConfig(max_steps=1, beta=0.1, cast_lm_head_to_fp32=True, fused_lm_head=True)
    scored = CompletionLogprobs(model, temperature=1.0, num_tokens=len(tokenizer), fused_lm_head=True)
    reference = make_reference(Accelerator(cpu=True), scored, config)
    with torch.no_grad():
        logprobs_T = scored(PACKED)
        default_T = CompletionLogprobs(model, temperature=1.0, num_tokens=len(tokenizer))(PACKED)
        assert torch.equal(reference(PACKED), logprobs_T)
    # Logits in float32: a rounding of bfloat16 would be 1e-3.
    assert isinstance(model.lm_head, Float32Linear)
    torch.testing.assert_close(logprobs_T, default_T, rtol=0, atol=3e-6)


def test_fused_head_allows_no_token_at_all(model: LlamaForCausalLM) -> None:
    # As a process has it whose slice of a split sequence predicts nothing.
    hidden_TD = torch.zeros(0, model.config.hidden_size, requires_grad=True)
    none_T = torch.zeros(0, dtype=torch.long)
    logprobs_T = fused_logprobs(model.lm_head, hidden_TD, none_T, temperature=0.7, num_tokens=20)
    assert logprobs_T.shape == (0,)
    logprobs_T.sum().backward()
    assert hidden_TD.grad.shape == hidden_TD.shape
    assert model.lm_head.weight.grad.abs().max() == 0


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": "lm_head"},
        {"target_modules": r"(.*\.v_proj|lm_head)"},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "target_parameters": ["lm_head.weight"]},
    ],
)
def test_fused_head_rejects_an_adapter_on_the_head(model: LlamaForCausalLM, lora: dict[str, object]) -> None:
    with pytest.raises(InputError, match="set it to false, or leave the head out"):
        check_head_targets(lora)
    if "target_parameters" not in lora:
        with pytest.raises(InputError, match="rloo.fused_lm_head reads the weight of a plain linear layer"):
            check_head(get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora)))


@pytest.mark.parametrize("names", ["all-linear", ["q_proj", "down_proj"], r".*\.mlp\..*_proj"])
def test_fused_head_allows_adapters_elsewhere(model: LlamaForCausalLM, names: str | list[str]) -> None:
    check_head_targets({"target_modules": names, "modules_to_save": None})
    check_head(get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=names)))


@pytest.mark.parametrize("options", [{"top_k": 20}, {"top_p": 0.9}])
def test_fused_head_rejects_filtered_sampling(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match="set fused_lm_head to false, or top_p to 1 and top_k to null"):
        RLOOConfig(max_steps=1, fused_lm_head=True, **options)
