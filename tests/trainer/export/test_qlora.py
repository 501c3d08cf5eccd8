"""The column QLoRA of the table of adapters, run: each adapter is trained on a base of four bits, resumed and exported.

bitsandbytes computes on a CPU too, so that only the check for a GPU is left out here. Needs the extra `qlora`.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from rekatrain.trainer.cli import main
from rekatrain.trainer.models.load import load_model
from rekatrain.trainer.models.probe import TOLERANCES, compare, read_probe, run_probe
from rekatrain.trainer.models.weights import load_adapter
from tests.helpers.adapters import METHODS
from tests.helpers.exports import servable_llama
from tests.trainer.export.test_adapter_table import QUICK, TABLE, write_recipe

FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
YES = [method for method, cells in TABLE.items() if cells["QLoRA"]]


@pytest.fixture(autouse=True)
def cpu_as_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute as bitsandbytes does on a GPU: its kernel for CPUs with bfloat16 rounds every layer's output."""
    modules = pytest.importorskip("bitsandbytes.nn.modules", reason="the extra qlora is not installed")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)
    monkeypatch.setattr("rekatrain.trainer.models.load.check_quantization_here", lambda recipe: None)
    monkeypatch.setattr("rekatrain.trainer.plan.memory.check_quantization", lambda recipe, **launch: None)


CASES = [
    pytest.param(method, dtype, marks=[] if method in QUICK else pytest.mark.slow)
    for method in YES
    for dtype in ("float32", "bfloat16")
]


@pytest.mark.parametrize(("method", "dtype"), CASES)
def test_qlora_run_is_resumed_and_exported(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, method: str, dtype: str
) -> None:
    base = {"pretrained_model_name_or_path": str(tmp_path / "model"), "dtype": dtype, "quantization_config": FOUR_BITS}
    path = write_recipe(tmp_path, tokenizer, method, model=base)
    # bitsandbytes packs blocks of 64 weights.
    sizes = {"tie_word_embeddings": METHODS[method][0], "intermediate_size": 128}
    servable_llama(tokenizer, **sizes).save_pretrained(tmp_path / "model")
    main(["train", str(path)])
    checkpoints = tmp_path / "run" / "checkpoints"
    trained = load_file(checkpoints / "checkpoint-3" / "adapter_model.safetensors")

    # The adapter on a base that is quantized anew is the model of the training process.
    probe = read_probe(checkpoints / "checkpoint-3")
    assert probe is not None and probe.dtype == "quantized"
    texts = [ids.tolist() for ids in probe.ids]
    model = load_adapter(load_model(**base), str(checkpoints / "checkpoint-3")).eval()
    largest, mean = compare(probe, run_probe(model, texts).logprobs)
    assert largest <= TOLERANCES[dtype][0] and mean <= TOLERANCES[dtype][1]

    main(["export", str(tmp_path / "run"), str(tmp_path / "merged")])  # held against training, and verified
    main(["export", str(tmp_path / "run"), str(tmp_path / "adapter"), "--as", "adapter"])
    merged = compare(probe, run_probe(load_model(str(tmp_path / "merged"), dtype="float32"), texts).logprobs)
    untrained = compare(probe, run_probe(load_model(str(tmp_path / "model"), dtype="float32"), texts).logprobs)
    assert merged[1] < untrained[1] / 2

    for step in (2, 3):
        shutil.rmtree(checkpoints / f"checkpoint-{step}")
    main(["train", str(path), "--resume"])
    resumed = load_file(checkpoints / "checkpoint-3" / "adapter_model.safetensors")
    assert all(torch.equal(trained[name], resumed[name]) for name in trained)
    # Small updates of an adapter are not rounded away.
    assert {tensor.dtype for name, tensor in trained.items() if ".lora_" in name} == {torch.float32}
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tmp_path / "model")
