"""The column reward of the table of adapters: trained, resumed, merged and scored as in training, or refused first."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from rekatrain.data.errors import InputError
from rekatrain.rewards.models.classifier import classify, set_pad
from rekatrain.trainer.cli import main
from rekatrain.trainer.models.load import add_adapter
from rekatrain.trainer.models.lora_targets import check_quantized_targets
from rekatrain.trainer.reward_model.score_probe import read_scores
from tests.conftest import tiny_config
from tests.helpers.adapters import METHODS, PLAIN
from tests.helpers.reward_models import save_encoder
from tests.trainer.export.test_adapter_table import TABLE, refusal, write_recipe

WEIGHTS = "adapter_model.safetensors"
# Adapters of a reward model alone: the head is a part of each of them.
HEADS: dict[str, dict[str, Any]] = {
    "the head by its name": {**PLAIN, "modules_to_save": ["score", "embed_tokens"]},
    "a whole layer": {**PLAIN, "target_modules": ["q_proj"], "modules_to_save": ["down_proj"]},
    "all linear layers": {**PLAIN, "target_modules": "all-linear", "bias": "all"},
}
ENCODER = {**PLAIN, "target_modules": ["query", "value"], "use_dora": True, "rank_pattern": {"query": 2}}
# An encoder's files may lack its pooler, on which the classifier is built: it is new, as the head is.
WITHOUT_POOLER = "an encoder without a pooler"
QUICK = ("DoRA, rsLoRA, patterns", "the head by its name", WITHOUT_POOLER)
WORKING = [*(method for method, cells in TABLE.items() if cells["reward"]), *HEADS, "an encoder", WITHOUT_POOLER]


def write_reward_recipe(folder: Path, tokenizer: PreTrainedTokenizerFast, method: str) -> Path:
    """Write the recipe of three steps of stage reward, with its model and pairs; return the recipe's path."""
    known = method if method in METHODS else "plain LoRA"
    pairs = [{"prompt": f"{n} + {n} =", "chosen": f"It is {2 * n}.", "rejected": f"{2 * n}"} for n in range(1, 5)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    dataset = {"path": str(folder / "pairs.jsonl"), "format": "preference"}
    path = write_recipe(folder, tokenizer, known, stage="reward", dataset=dataset)
    recipe = json.loads(path.read_text())
    recipe["reward"] = recipe.pop("sft")
    if method in ("an encoder", WITHOUT_POOLER):
        shutil.rmtree(folder / "model")
        save_encoder(folder / "model", tokenizer)
        model = AutoModelForSequenceClassification.from_pretrained(
            folder / "model", num_labels=1, ignore_mismatched_sizes=True
        )
        model.save_pretrained(folder / "model")
        recipe["lora"] = ENCODER
    if method == WITHOUT_POOLER:
        weights = load_file(folder / "model" / "model.safetensors")
        kept = {name: tensor for name, tensor in weights.items() if "pooler" not in name and "classifier" not in name}
        save_file(kept, folder / "model" / "model.safetensors", metadata={"format": "pt"})
        recipe["lora"] = {**PLAIN, "target_modules": ["query", "value"], "modules_to_save": ["pooler"]}
    recipe["lora"] = HEADS.get(method, recipe["lora"])
    path.write_text(json.dumps(recipe))
    return path


def train_and_resume(recipe: Path) -> dict[str, torch.Tensor]:
    """Train a run of three steps; return its adapter, which a run that is resumed at step 1 has bit for bit."""
    main(["train", str(recipe)])
    run, again = recipe.parent / "run", recipe.parent / "resumed"
    shutil.copytree(run, again, symlinks=True)
    for step in (2, 3):
        shutil.rmtree(again / "checkpoints" / f"checkpoint-{step}")
    main(["train", str(recipe), "--resume", f"output_dir={again}"])
    unbroken, resumed = (load_file(each / "checkpoints" / "checkpoint-3" / WEIGHTS) for each in (run, again))
    assert unbroken.keys() == resumed.keys()
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)
    return unbroken


@pytest.mark.parametrize(
    "method", [pytest.param(method, marks=() if method in QUICK else pytest.mark.slow) for method in WORKING]
)
def test_reward_adapter_resumes_and_scores_as_trained(tmp_path: Path, tokenizer, method: str) -> None:
    path = write_reward_recipe(tmp_path, tokenizer, method)
    checkpoints = tmp_path / "run" / "checkpoints"
    trained = train_and_resume(path)
    assert any(name.endswith(("score.weight", "classifier.weight")) for name in trained)

    main(["export", str(tmp_path / "run"), str(tmp_path / "out")])
    base = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=1)
    expected = PeftModel.from_pretrained(base, str(checkpoints / "checkpoint-3")).merge_and_unload()
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert_close(exported.state_dict(), expected.state_dict(), rtol=0, atol=0)
    sequences, scores = read_scores(checkpoints / "checkpoint-3")
    set_pad(exported, tokenizer)
    assert_close(classify(exported.eval(), sequences, micro_batch_tokens=512)[:, 0], scores, rtol=1e-4, atol=1e-5)
    assert (scores - read_scores(checkpoints / "checkpoint-1")[1]).abs().max() > 1e-3  # training has changed them


@pytest.mark.parametrize("method", [method for method, cells in TABLE.items() if not cells["reward"]])
def test_adapter_that_no_reward_model_has_is_refused(
    tmp_path: Path, tokenizer, no_weights: None, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    path = write_reward_recipe(tmp_path, tokenizer, method)
    assert refusal(capsys, "train", str(path), "--dry-run").startswith("rekatrain: error: lora.")


def test_new_part_that_no_adapter_saves_is_refused(
    tmp_path: Path, tokenizer, no_weights: None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_reward_recipe(tmp_path, tokenizer, WITHOUT_POOLER)
    line = refusal(capsys, "train", str(path), "--dry-run", "lora.modules_to_save=null")
    assert "the model's files lack bert.pooler.dense.bias" in line and "lora.modules_to_save: [pooler]" in line
    main(["train", str(path), "--dry-run", "lora=null"])  # without an adapter all is trained and saved


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"target_modules": ["q_proj", "score"]}, "lora.target_modules names score, the head of the reward model"),
        ({"target_parameters": ["score.weight"]}, "lora.target_parameters names score.weight, the head of the"),
        ({"target_modules": ".*"}, "lora: target_modules includes a LlamaModel, and LoRA adapts Linear and Embedding"),
    ],
)
def test_adapter_on_the_head_is_refused(
    tmp_path: Path, tokenizer, no_weights: None, capsys: pytest.CaptureFixture[str], lora: dict, message: str
) -> None:
    path = write_reward_recipe(tmp_path, tokenizer, "plain LoRA")
    recipe = json.loads(path.read_text())
    path.write_text(json.dumps(recipe | {"lora": recipe["lora"] | lora}))
    assert message in refusal(capsys, "train", str(path))


@pytest.mark.parametrize(("name", "is_packed"), [("down_proj", True), ("score", False), ("norm", False)])
def test_qlora_of_a_reward_model_packs_all_but_the_head(tokenizer, name: str, is_packed: bool) -> None:
    model = AutoModelForSequenceClassification.from_config(tiny_config(tokenizer, num_labels=1))
    lora = {"r": 2, "target_modules": ["q_proj"], "modules_to_save": [name]}
    adapted = add_adapter(model, lora, task_type="SEQ_CLS")
    assert lora["modules_to_save"] == [name]  # PEFT adds the head to its own list
    if is_packed:
        with pytest.raises(InputError, match=r"lora\.modules_to_save includes model\.layers\.0\.mlp\.down_proj"):
            check_quantized_targets(adapted)
    else:
        check_quantized_targets(adapted)
