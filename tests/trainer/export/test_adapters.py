"""Adapters are served as they were trained: one scale for vLLM, the base's revision, all kinds that PEFT loads."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from rekatrain.trainer.cli import main
from rekatrain.trainer.export.lazy_weights import LazyWeights
from rekatrain.trainer.export.probe import probe_logprobs
from rekatrain.trainer.models.adapter_scales import fold_scales
from rekatrain.trainer.models.probe import compare, read_probe, run_probe
from rekatrain.trainer.models.source import find_source
from rekatrain.trainer.models.vllm_limits import largest_rank
from tests.conftest import tiny_llama
from tests.helpers.adapters import load_with_one_scale
from tests.helpers.exports import write_sft_recipe

PROBE = torch.arange(5, 45)[None]
TARGETS = ["q_proj", "v_proj", "down_proj"]
PATTERNS = {
    "rank": {"rank_pattern": {"q_proj": 8, "layers.1.mlp.down_proj": 2}},
    "alpha": {"alpha_pattern": {"v_proj": 40, "layers.0.self_attn.q_proj": 3}},
    "both": {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 5, r".*down_proj": 64}},
}


def make_adapter(folder: Path, base: LlamaForCausalLM, **lora: Any) -> PeftModel:
    """Save an adapter with random A and B."""
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, task_type="CAUSAL_LM", **lora))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(str(folder))
    return model.eval()


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_folded_adapter_has_one_scale_for_all_modules(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, pattern: str, use_rslora: bool
) -> None:
    trained = make_adapter(tmp_path, tiny_llama(tokenizer), **PATTERNS[pattern], use_rslora=use_rslora)
    expected = probe_logprobs(trained, PROBE)
    wrong = probe_logprobs(load_with_one_scale(tmp_path, tiny_llama(tokenizer)), PROBE)
    assert (wrong - expected).abs().max() > 0.1  # vLLM without folding
    fold_scales(tmp_path)
    assert_close(probe_logprobs(load_with_one_scale(tmp_path, tiny_llama(tokenizer)), PROBE), expected)
    by_peft = PeftModel.from_pretrained(tiny_llama(tokenizer), str(tmp_path)).eval()
    assert_close(probe_logprobs(by_peft, PROBE), expected)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    fold_scales(tmp_path)  # again: nothing is left to fold
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").write_bytes(before["adapter_model.safetensors"])
    assert_close(tensors, load_file(tmp_path / "adapter_model.safetensors"), rtol=1e-6, atol=0)


def test_adapter_without_patterns_keeps_its_files(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    make_adapter(tmp_path, tiny_llama(tokenizer))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    fold_scales(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_adapter_on_bfloat16_embeddings_keeps_its_precision(tmp_path: Path, tokenizer) -> None:
    tiny_llama(tokenizer).save_pretrained(tmp_path / "model")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    lora = LoraConfig(r=4, lora_alpha=6, target_modules=["embed_tokens"], rank_pattern={"embed_tokens": 2})
    model = get_peft_model(base, lora)
    layer = model.get_input_embeddings()
    matrices = layer.lora_embedding_A.default, layer.lora_embedding_B.default
    for matrix in matrices:
        torch.nn.init.normal_(matrix)
    assert matrices[0].dtype == torch.float32
    expected = layer.base_layer.weight.float() + (matrices[1] @ matrices[0]).T * 3
    model.save_pretrained(str(tmp_path / "adapter"))  # with the embeddings, in bfloat16
    for _ in range(2):
        merged = LazyWeights(find_source(str(tmp_path / "adapter")))["model.embed_tokens.weight"]
        assert_close(merged, expected)
        fold_scales(tmp_path / "adapter")


def test_largest_rank_counts_patterns() -> None:
    assert largest_rank({}) == 8 and largest_rank({"r": 4, "rank_pattern": None}) == 4
    assert largest_rank({"r": 4, "rank_pattern": {"q_proj": 32, "v_proj": 2}}) == 32


@pytest.mark.slow
@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_dora_is_exported_as_trained(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, form: str) -> None:
    recipe = write_sft_recipe(tmp_path, tokenizer)
    main(["train", str(recipe), "lora.use_dora=true", "sft.max_steps=3"])
    main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--as", form])
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    expected = probe_logprobs(PeftModel.from_pretrained(base, str(checkpoint)).eval(), PROBE)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / ("out" if form == "merged" else "model"))
    if form == "adapter":
        exported = PeftModel.from_pretrained(exported, str(tmp_path / "out")).eval()
    assert_close(probe_logprobs(exported, PROBE), expected, rtol=0, atol=1e-4)


@pytest.fixture
def hub_model(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A cache of the hub with the model me/model: revisions main and v2 have other weights. Returns their commits."""
    commits = {"main": "a" * 40, "v2": "b" * 40}
    cache = tmp_path / "cache"
    model = cache / "models--me--model"
    (model / "refs").mkdir(parents=True)
    for seed, (name, commit) in enumerate(commits.items()):
        (model / "refs" / name).write_text(commit)
        snapshot = model / "snapshots" / commit
        tiny_llama(tokenizer, seed=seed).save_pretrained(snapshot)
        tokenizer.save_pretrained(snapshot)
    monkeypatch.setenv("HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return commits


@pytest.mark.slow
def test_export_uses_the_revision_that_was_trained(
    tmp_path: Path, hub_model: dict[str, str], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_sft_recipe(tmp_path, tokenizer)
    shutil.rmtree(tmp_path / "model")
    model = ["model.pretrained_model_name_or_path=me/model", "model.revision=v2"]
    main(["train", str(recipe), *model, "sft.max_steps=2"])
    # The name v2 may mean other weights one day: what is recorded is the commit.
    (tmp_path / "cache" / "models--me--model" / "refs" / "v2").write_text(hub_model["main"])
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    base = AutoModelForCausalLM.from_pretrained(
        tmp_path / "cache" / "models--me--model" / "snapshots" / hub_model["v2"]
    )
    expected = probe_logprobs(PeftModel.from_pretrained(base, str(checkpoint)).eval(), PROBE)

    main(["export", str(tmp_path / "run"), str(tmp_path / "merged")])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert_close(probe_logprobs(merged, PROBE), expected, rtol=0, atol=1e-4)

    main(["export", str(tmp_path / "run"), str(tmp_path / "adapter"), "--as", "adapter"])
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("me/model", hub_model["v2"])
    script = (tmp_path / "adapter" / "serving" / "vllm.sh").read_text()
    assert f"vllm serve me/model --revision {hub_model['v2']} " in script


def test_revision_of_a_folder_is_rejected(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_sft_recipe(tmp_path, tokenizer)
    with pytest.raises(SystemExit) as caught:
        main(["train", str(recipe), "model.revision=v2"])
    assert caught.value.code == 2
    assert "model.revision is v2, which is for models of the hub" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("lora", ["lora={r: 4, target_modules: [q_proj]}", "lora=null"])
def test_checkpoint_holds_the_log_probabilities_of_training(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, lora: str
) -> None:
    recipe = write_sft_recipe(tmp_path, tokenizer)
    main(["train", str(recipe), "sft.max_steps=2", lora])
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    probe = read_probe(checkpoint)
    assert probe is not None and probe.dtype == "float32" and len(probe.ids) == 3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model" if "r: 4" in lora else checkpoint)
    if "r: 4" in lora:
        model = PeftModel.from_pretrained(model, str(checkpoint)).eval()
    for ids, logprobs in zip(probe.ids, probe.logprobs, strict=True):
        expected = probe_logprobs(model, ids[None])[:-1].gather(1, ids[1:, None])[:, 0]
        assert_close(logprobs, expected, rtol=0, atol=1e-5)
    rows = [tokenizer.decode(ids) for ids in probe.ids]
    assert "1,234" in rows[0] and "<reasoning>" in rows[0] and "Twice" in rows[1]


def test_probe_of_a_bfloat16_run_is_that_of_its_weights(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    recipe = write_sft_recipe(tmp_path, tokenizer)
    main(["train", str(recipe), "sft.max_steps=3", "sft.save_steps=2", "sft.bf16=true"])  # trains on after a probe
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-3"
    probe = read_probe(checkpoint)
    assert probe is not None and probe.dtype == "float32"
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    model = PeftModel.from_pretrained(base, str(checkpoint)).eval()
    assert compare(probe, run_probe(model, [ids.tolist() for ids in probe.ids]).logprobs)[0] < 1e-4


def test_export_rejects_a_base_that_changed_since_training(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_sft_recipe(tmp_path, tokenizer)
    main(["train", str(recipe), "sft.max_steps=2"])
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    base.lm_head.weight.data[5] *= 1.2  # one row of one matrix
    base.save_pretrained(tmp_path / "model")
    for form in ("merged", "adapter", "gguf"):
        with pytest.raises(SystemExit) as caught:
            main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--as", form])
        assert caught.value.code == 2
        assert "is not the model that was trained: log-probabilities differ" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
