"""Exports hold one layer and one shard in memory; tests/benchmarks/export_memory.py is the long form."""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from rekatrain.data.errors import InputError
from rekatrain.trainer.export.export import export
from rekatrain.trainer.export.folders import write_merged
from rekatrain.trainer.export.lazy_weights import LazyWeights, streaming
from rekatrain.trainer.models.probe import find_difference, read_probe, run_probe
from rekatrain.trainer.models.source import find_source
from tests.benchmarks.export_memory import Peak, make_run
from tests.conftest import tiny_config, tiny_llama, write_jsonl

TEXTS = [[5, 6, 7, 8], list(range(10, 40))]


def save(folder: Path, model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, **options: object) -> str:
    model.save_pretrained(folder, **options)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_merging_and_running_hold_two_layers_and_a_shard(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    layer = make_run(tmp_path, hidden=512, layers=12, vocabulary=500)
    checkpoint = tmp_path / "run" / "checkpoints" / "checkpoint-1"
    training = read_probe(checkpoint)
    assert training is not None
    weights = LazyWeights(find_source(str(checkpoint)))
    weights["model.layers.0.mlp.down_proj.weight"]  # the libraries' own buffers
    peak = Peak()
    peak.start()
    with streaming(weights) as model:
        ours = run_probe(model, [ids.tolist() for ids in training.ids])
    write_merged(tmp_path / "out", weights.rounded(torch.bfloat16), tokenizer, max_shard_size="10MB")
    time.sleep(0.02)
    peak.is_over = True
    assert find_difference(training, ours) is None
    limit = 2 * layer / 2**20 + 10
    assert 12 * layer / 2**20 > 4 * limit  # the whole model in float32
    assert peak.peak_mb - peak.start_mb < limit


@pytest.mark.slow
def test_reward_export_holds_two_layers_and_a_shard(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    sizes = {"hidden_size": 512, "num_attention_heads": 8, "intermediate_size": 2048, "num_hidden_layers": 12}
    config = tiny_config(tokenizer, **sizes, num_labels=1, pad_token_id=tokenizer.eos_token_id)
    model = LlamaForSequenceClassification(config)
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters()) * 4
    save(tmp_path / "run" / "checkpoints" / "checkpoint-1", model, tokenizer)
    del model
    row = {"prompt": "2 + 2 =", "chosen": "It is 4.", "rejected": "4"}
    recipe = {
        "stage": "reward",
        "output_dir": str(tmp_path / "run"),
        "model": {"pretrained_model_name_or_path": str(tmp_path / "model"), "dtype": "float32"},
        "dataset": {"path": write_jsonl(tmp_path / "pairs.jsonl", row), "format": "preference"},
    }
    (tmp_path / "run" / "recipe.yaml").write_text(json.dumps(recipe))
    for name in ("first", "second"):  # the libraries' own buffers are there for the second
        peak = Peak()
        peak.start()
        export(tmp_path / "run" / "checkpoints" / "checkpoint-1", tmp_path / name, max_shard_size="10MB")
        time.sleep(0.02)
        peak.is_over = True
    limit = 2 * layer / 2**20 + 10
    assert 12 * layer / 2**20 > 4 * limit  # the whole model in float32
    assert peak.peak_mb - peak.start_mb < limit
    assert len(list((tmp_path / "second").glob("*.safetensors"))) > 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_streamed_model_computes_as_the_loaded_one(tmp_path: Path, tokenizer, dtype: torch.dtype) -> None:
    folder = save(tmp_path / "model", tiny_llama(tokenizer).to(dtype), tokenizer, max_shard_size="20KB")
    assert (tmp_path / "model" / "model.safetensors.index.json").exists()
    expected = run_probe(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), TEXTS)
    weights = LazyWeights(find_source(folder))
    assert weights.is_streamed
    for _ in range(2):  # again, after the first run has given its tensors back
        with streaming(weights) as model:
            logprobs = run_probe(model, TEXTS).logprobs
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(logprobs, expected.logprobs, strict=True))


def test_pickled_base_is_loaded_whole_and_written(tmp_path: Path, tokenizer) -> None:
    model = tiny_llama(tokenizer)
    folder = save(tmp_path / "model", model, tokenizer)
    torch.save(model.state_dict(), tmp_path / "model" / "pytorch_model.bin")
    (tmp_path / "model" / "model.safetensors").unlink()
    weights = LazyWeights(find_source(folder))
    assert not weights.is_streamed
    write_merged(tmp_path / "out", weights, tokenizer, max_shard_size="5GB")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in model.state_dict().items())


def test_weights_that_are_not_finite_are_rejected(tmp_path: Path, tokenizer) -> None:
    model = tiny_llama(tokenizer)
    for value in (float("nan"), float("inf"), float("-inf")):
        model.model.layers[1].mlp.up_proj.weight.data[3, 4] = value
        weights = LazyWeights(find_source(save(tmp_path / "model", model, tokenizer)))
        with pytest.raises(InputError, match=r"not finite, the first are in model\.layers\.1\.mlp\.up_proj\.weight"):
            dict(weights)


def test_index_of_shards_is_transformers_own(tmp_path: Path, tokenizer) -> None:
    model = tiny_llama(tokenizer)
    weights = LazyWeights(find_source(save(tmp_path / "model", model, tokenizer, max_shard_size="20KB")))
    write_merged(tmp_path / "out", weights, tokenizer, max_shard_size="20KB")
    indices = [json.loads((tmp_path / name / "model.safetensors.index.json").read_text()) for name in ("model", "out")]
    assert indices[0]["weight_map"] == indices[1]["weight_map"]
    assert indices[0]["metadata"]["total_size"] == indices[1]["metadata"]["total_size"]
