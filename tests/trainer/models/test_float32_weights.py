"""All that is trained on a bfloat16 model is float32, is used rounded, and is saved, resumed and exported right."""

import copy
import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaForSequenceClassification, PreTrainedTokenizerFast

from rekatrain.trainer.cli import main
from rekatrain.trainer.models.continued import continue_adapter
from rekatrain.trainer.models.load import add_adapter, load_policy
from rekatrain.trainer.models.optimizers import make_optimizer
from rekatrain.trainer.models.quantization import keep_adapter_dtype
from rekatrain.trainer.recipe.load import load_recipe
from rekatrain.trainer.rloo.kernels.float32_head import compute_head_in_float32
from rekatrain.trainer.rloo.kernels.grouped_attention import NAME as GROUPED_ATTENTION
from rekatrain.trainer.rloo.kernels.grouped_attention import decoder_and_head
from rekatrain.trainer.rloo.logprobs import CompletionLogprobs, pack_completions
from rekatrain.trainer.rloo.sampler.in_process import Sampler
from tests.conftest import tiny_config, tiny_llama
from tests.end_to_end.small_runs import write_data, write_recipe

# Matrices, embeddings, norms, a block of the model, and the biases of layers with and without an adapter.
WHOLE = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm", "embed_tokens", "mlp"]}
BIASES = {"r": 2, "target_modules": ["q_proj", "v_proj"], "bias": "all"}
LEARNING_RATE, STEPS = 1e-5, 10
IDS = torch.arange(3, 43).reshape(2, 20)
TaskType = Literal["CAUSAL_LM", "SEQ_CLS"]


def bfloat16_model(tokenizer: PreTrainedTokenizerFast, task_type: TaskType = "CAUSAL_LM") -> Any:
    """Return a bfloat16 Llama with biases."""
    if task_type == "CAUSAL_LM":
        return tiny_llama(tokenizer, attention_bias=True).bfloat16()
    torch.manual_seed(0)
    config = tiny_config(tokenizer, attention_bias=True, num_labels=1, pad_token_id=0)
    return LlamaForSequenceClassification(config).bfloat16().eval()


def trained_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters outside of LoRA's own matrices."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad and ".lora_" not in n}


@pytest.mark.parametrize("autocasts", [False, True], ids=["as the weights", "autocast"])
@pytest.mark.parametrize(
    ("lora", "task_type"),
    [(WHOLE, "CAUSAL_LM"), (BIASES, "CAUSAL_LM"), ({**WHOLE, "modules_to_save": ["norm"]}, "SEQ_CLS")],
    ids=["modules", "biases", "reward model"],
)
def test_updates_below_a_bfloat16_step_are_kept(
    tokenizer: PreTrainedTokenizerFast, lora: dict[str, Any], task_type: TaskType, autocasts: bool
) -> None:
    base = bfloat16_model(tokenizer, task_type)
    policy = add_adapter(copy.deepcopy(base), lora, task_type=task_type)
    trained = trained_of(policy)
    assert len(trained) >= (8 if task_type == "CAUSAL_LM" else 2)
    assert all(parameter.dtype == torch.float32 for parameter in policy.parameters() if parameter.requires_grad)
    plain = copy.deepcopy(base).requires_grad_()  # its bfloat16 weights have the gradients to compare with
    with torch.autocast("cpu", torch.bfloat16, enabled=autocasts):
        ours, theirs = policy(IDS).logits, plain(IDS).logits
    assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    weights = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    for logits in (ours, theirs):
        (weights * logits.float()).mean().backward()
    for name, parameter in trained.items():
        plain_name = name.removeprefix("base_model.model.")
        for part in (".base_layer", ".modules_to_save.default"):
            plain_name = plain_name.replace(part, "")
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
        expected = plain.get_parameter(plain_name).grad
        torch.testing.assert_close(parameter.grad, expected.float(), rtol=2**-6, atol=1e-7)

    # AdamW in float64, with the gradients that training has.
    policy.zero_grad()
    begin = {name: parameter.detach().clone() for name, parameter in trained.items()}
    exact = {name: nn.Parameter(values.double()) for name, values in begin.items()}
    settings: dict[str, Any] = {"lr": LEARNING_RATE, "betas": (0.9, 0.999), "eps": 1e-12, "weight_decay": 0.0}
    group = {"params": [parameter for parameter in policy.parameters() if parameter.requires_grad]}
    optimizer = make_optimizer("adamw_torch_fused", policy, [group], **settings)
    oracle = torch.optim.AdamW(exact.values(), **settings)
    for step in range(STEPS):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocasts):
            (weights * policy((IDS + step) % 300).logits.float()).mean().backward()
        for name, parameter in trained.items():
            assert parameter.grad is not None
            exact[name].grad = parameter.grad.double()
        optimizer.step()
        oracle.step()
        optimizer.zero_grad()
    rounding = STEPS * 2**-24 * 4  # weights lie below 4
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.double(), exact[name].detach(), rtol=0, atol=rounding)
    # The norms begin at 1, where a step of bfloat16 is 78 times the largest sum of these updates.
    norms = [name for name in trained if "norm" in name]
    for name in norms:
        assert (trained[name] != begin[name]).all() and torch.equal(trained[name].bfloat16(), begin[name].bfloat16())
    assert norms or lora is BIASES


def moved_policy(tokenizer: PreTrainedTokenizerFast, lora: dict[str, Any]) -> Any:
    """Return a policy on a bfloat16 model whose trained weights are others than the base's, and no bfloat16 numbers."""
    policy = add_adapter(bfloat16_model(tokenizer), lora)
    generator = torch.Generator().manual_seed(2)
    for parameter in trained_of(policy).values():
        noise: Tensor = 0.3 * torch.randn(parameter.shape, generator=generator)
        parameter.data += noise
    return policy


@pytest.mark.parametrize("cast_head", [False, True])
@pytest.mark.parametrize("lora", [WHOLE, BIASES], ids=["modules", "biases"])
def test_sampled_policy_is_the_trained_one(
    tokenizer: PreTrainedTokenizerFast, lora: dict[str, Any], cast_head: bool
) -> None:
    policy = moved_policy(tokenizer, lora)
    decoder, _ = decoder_and_head(policy)
    decoder.set_attn_implementation(GROUPED_ATTENTION)
    if cast_head:
        compute_head_in_float32(policy)
    prompt = [5, 6, 7, 8]
    sampler = Sampler(policy, tokenizer, max_completion_length=12, temperature=1.0, batch_size=8)
    (group,) = sampler.sample([prompt], [(1, 0)], 8)
    ids = [completion.ids for completion in group]
    scored = CompletionLogprobs(policy, temperature=1.0, num_tokens=len(tokenizer))
    base = bfloat16_model(tokenizer)
    base.set_attn_implementation(GROUPED_ATTENTION)
    packed = pack_completions([prompt], [ids], torch.device("cpu"))
    with torch.no_grad():
        ours = scored(packed)
        of_base = CompletionLogprobs(base, temperature=1.0, num_tokens=len(tokenizer))(packed)
    sampled = torch.tensor([logprob for completion in group for logprob in completion.logprobs])
    assert (ours - sampled).abs().mean() < 0.03  # the rounding of two kernels
    assert (of_base - sampled).abs().mean() > 0.3


def test_float32_head_of_a_trained_copy_is_not_rounded(tokenizer: PreTrainedTokenizerFast) -> None:
    policy = moved_policy(tokenizer, WHOLE)
    compute_head_in_float32(policy)
    head = policy.get_base_model().lm_head
    inputs = torch.randn(3, 32, generator=torch.Generator().manual_seed(3)).bfloat16()
    expected = inputs.float() @ head.modules_to_save["default"].weight.T
    assert torch.equal(head(inputs), expected) and expected.dtype == torch.float32


def write_stage(folder: Path, tokenizer: PreTrainedTokenizerFast, stage: str) -> Path:
    """Write data, a bfloat16 model and a recipe of three steps with tiny updates -> the recipe's path."""
    write_data(folder)
    tiny_llama(tokenizer, attention_bias=stage == "sft").bfloat16().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    section = {"max_steps": 3, "learning_rate": LEARNING_RATE, "save_steps": 1, "lr_scheduler_type": "constant"}
    own: dict[str, Any] = {
        "sft": {"per_device_train_batch_size": 2},
        "reward": {"per_device_train_batch_size": 2},
        "rloo": {"prompts_per_step": 2, "num_generations": 4, "max_completion_length": 8, "beta": 0.1},
    }[stage]
    modules = ["norm"] if stage == "reward" else ["lm_head", "norm", "embed_tokens"]
    path = write_recipe(
        folder,
        "run",
        folder / "model",
        stage=stage,
        dataset={"path": str(folder / f"{stage if stage != 'rloo' else 'sums'}.jsonl")}
        | {"format": "preference" if stage == "reward" else "prompt_answer"},
        **({"rewards": {"regex": {"pattern": "[a-m]"}}} if stage == "rloo" else {}),
        lora={"r": 2, "target_modules": ["q_proj"], "modules_to_save": modules}
        | ({"bias": "all"} if stage == "sft" else {}),
        **{stage: section | own},
    )
    recipe = json.loads(path.read_text())
    recipe["model"]["dtype"] = "bfloat16"
    path.write_text(json.dumps(recipe))
    return path


@pytest.mark.parametrize(
    "stage", ["rloo", pytest.param("sft", marks=pytest.mark.slow), pytest.param("reward", marks=pytest.mark.slow)]
)
def test_stage_trains_resumes_and_exports(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, stage: str) -> None:
    path = write_stage(tmp_path, tokenizer, stage)
    main(["train", str(path)])
    name = "checkpoints/checkpoint-3/adapter_model.safetensors"
    unbroken = load_file(tmp_path / "run" / name)
    whole = {key: tensor for key, tensor in unbroken.items() if ".lora_" not in key}
    # Five norms, a head and embeddings; the head of a reward model; eight biases.
    assert len(whole) == {"sft": 15, "reward": 6, "rloo": 7}[stage]
    assert all(tensor.dtype == torch.float32 for tensor in unbroken.values())
    for key, tensor in whole.items():
        if "norm" in key:  # they have moved by less than a step of bfloat16
            assert (tensor != 1).float().mean() > 0.9 and (tensor.bfloat16() == 1).all()

    overrides = [f"output_dir={tmp_path / 'resumed'}"]
    main(["train", str(path), *overrides, f"{stage}.max_steps=1"])
    main(["train", str(path), *overrides, "--resume"])
    resumed = load_file(tmp_path / "resumed" / name)
    assert all(torch.equal(resumed[key], unbroken[key]) for key in unbroken)

    main(["export", str(tmp_path / "run"), str(tmp_path / "out")])  # held against the training process
    exported = load_file(tmp_path / "out" / "model.safetensors")
    for key, tensor in whole.items():
        merged = exported[key.removeprefix("base_model.model.").replace(".base_layer", "")]
        assert merged.dtype == torch.bfloat16 and torch.equal(merged, tensor.bfloat16())
    if stage == "reward":
        return

    # A run that continues the adapter begins with the float32 weights, also after TRL has rounded them.
    recipe = json.loads(path.read_text()) | {"output_dir": str(tmp_path / "next")}
    del recipe["lora"]
    recipe["model"]["pretrained_model_name_or_path"] = str(tmp_path / "run")
    path.write_text(json.dumps(recipe))
    policy = load_policy(continue_adapter(load_recipe(path)))
    for rounds in (False, True):
        if rounds:
            for parameter in policy.parameters():
                parameter.data = parameter.data.bfloat16()
            keep_adapter_dtype(policy, str(tmp_path / "run" / "checkpoints" / "checkpoint-3"))
        loaded = dict(policy.named_parameters())
        for key, tensor in unbroken.items():
            module, _, attribute = key.rpartition(".")
            inside = "" if ".lora_" in key else "modules_to_save."
            name = key if key in loaded else f"{module}.{inside}default.{attribute}"
            assert torch.equal(loaded[name], tensor)
