"""A config.json that ties two matrices and files that store them apart: no stage trains such a model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from rekatrain.data.errors import InputError
from rekatrain.trainer.cli import main
from rekatrain.trainer.export.stored_tensors import StoredTensors
from rekatrain.trainer.models.load import load_model
from tests.conftest import tiny_llama
from tests.helpers.exports import write_sft_recipe

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
LINE = "ties lm_head.weight to model.embed_tokens.weight (tie_word_embeddings), and its files store two matrices: set"


@pytest.fixture
def save(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Path]:
    """Write a recipe and its tied model, whose file also has a head: the embeddings plus `offset` in one element."""

    def write(offset: float, *, dtype: torch.dtype = torch.float32, **sections: Any) -> Path:
        path = write_sft_recipe(tmp_path, tokenizer)
        recipe = json.loads(path.read_text()) | sections
        recipe["sft"] |= {"max_steps": 1}
        path.write_text(json.dumps(recipe))
        tiny_llama(tokenizer, tie_word_embeddings=True).save_pretrained(tmp_path / "model")
        file = tmp_path / "model" / "model.safetensors"
        tensors = load_file(file)
        assert HEAD not in tensors
        tensors[EMBEDDINGS] = tensors[EMBEDDINGS].to(dtype)
        tensors[HEAD] = tensors[EMBEDDINGS].float().clone()
        tensors[HEAD][-1, -1] += offset
        save_file(tensors, file, metadata={"format": "pt"})
        return path

    return write


@pytest.mark.parametrize("stage", ["sft", "rloo"])
@pytest.mark.parametrize("options", [[], ["--dry-run"]])
def test_two_matrices_of_a_tied_model_are_refused(
    save: Callable[..., Path], no_weights: None, capsys, stage: str, options: list[str]
) -> None:
    sections = {"stage": stage}
    if stage == "rloo":
        sections |= {"rloo": {"max_steps": 1, "max_completion_length": 16}, "rewards": {"reasoning_format": None}}
    path = save(1e-3, **sections)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(path), *options])
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and LINE in line and line.count("\n") == 1, line
    assert not (path.parent / "run").exists()


def test_base_of_a_continued_adapter_is_checked(save: Callable[..., Path], no_weights: None, capsys, tmp_path) -> None:
    path = save(0.0)
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "model"), "r": 2}
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(adapter | {"target_modules": ["q_proj"]}))
    for file in (tmp_path / "model").glob("token*.json"):
        (tmp_path / "adapter" / file.name).write_bytes(file.read_bytes())
    save(1e-3)
    with pytest.raises(SystemExit):
        main(["train", str(path), "lora=null", f"model.pretrained_model_name_or_path={tmp_path / 'adapter'}"])
    assert LINE in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrix_that_is_stored_twice_trains_and_exports(
    save: Callable[..., Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    main(["train", str(save(0.0, dtype=dtype)), "lora=null"])
    main(["export", str(tmp_path / "run"), str(tmp_path / "out")])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings


def test_head_of_a_pickle_is_found_as_it_is_loaded(save: Callable[..., Path], tmp_path: Path) -> None:
    save(1e-3)
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    torch.save(tensors, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(InputError, match="ties lm_head.weight to model.embed_tokens.weight"):
        load_model(str(tmp_path / "model"), dtype="float32")


def test_tied_model_of_reward_training_needs_no_head(save: Callable[..., Path], tmp_path: Path, capsys) -> None:
    pairs = [{"prompt": f"{n}?", "chosen": f"{2 * n}", "rejected": f"{n}"} for n in range(1, 5)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    dataset = {"path": str(tmp_path / "pairs.jsonl"), "format": "preference"}
    path = save(1e-3, stage="reward", dataset=dataset)  # a classifier has no lm_head, so nothing contradicts
    main(["train", str(path), "--dry-run"])
    assert "# 4 pairs" in capsys.readouterr().out


def test_export_reads_the_files_that_transformers_reads(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny_llama(tokenizer)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    other = {name: tensor + 1 for name, tensor in load_file(sorted(tmp_path.glob("*.safetensors"))[0]).items()}
    for name in ("consolidated.safetensors", "zz.safetensors", "model-00001-of-00001.safetensors"):
        save_file(other, tmp_path / name)  # of another program, or of an older download
    stored = StoredTensors(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert stored.keys() == loaded.keys() and len(stored) > 10
    assert all(torch.equal(stored[name], loaded[name]) for name in stored)
