"""A folder to try a case in: good recipes of the three stages, their rows, a tiny model, an adapter and a run."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from ruamel.yaml import YAML
from transformers import LlamaForSequenceClassification

from rekatrain.trainer.run.checkpoints import seal
from tests.conftest import tiny_config, tiny_llama, tiny_tokenizer

FOLDER = Path(__file__).parent
GROUPS = sorted((FOLDER / "cases").glob("*.yaml"))


def read_yaml(path: Path) -> Any:  # what the file holds
    """Return the value of a YAML file of this folder."""
    return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))


BASE = read_yaml(FOLDER / "base.yaml")


def make_models(folder: Path) -> None:
    """Write the tiny models that all workspaces share: model, classifier and adapter (on model)."""
    tokenizer = tiny_tokenizer()
    model = tiny_llama(tokenizer)
    model.save_pretrained(folder / "model")
    torch.manual_seed(0)
    classifier = LlamaForSequenceClassification(tiny_config(tokenizer, num_labels=1))
    classifier.save_pretrained(folder / "classifier")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    adapted.peft_config["default"].base_model_name_or_path = "./model"
    adapted.save_pretrained(folder / "adapter")
    for name in ("model", "classifier", "adapter"):
        tokenizer.save_pretrained(folder / name)


def make_workspace(folder: Path, models: Path, *, has_run: bool) -> None:
    """Fill an empty folder: recipes, rows, links to the models; `has_run`: a run `done` with one checkpoint."""
    for name, files in BASE["files"].items():
        (folder / name).write_text(
            "".join(f"{json.dumps(row)}\n" for row in files) if isinstance(files, list) else files, encoding="utf-8"
        )
    for stage, recipe in BASE["recipes"].items():
        write_recipe(folder / f"{stage}.yaml", recipe)
    for name in ("model", "classifier", "adapter"):
        (folder / name).symlink_to(models / name)
    if has_run:
        checkpoint = folder / "done" / "checkpoints" / "checkpoint-1"
        shutil.copytree(models / "model", checkpoint)
        seal(checkpoint, step=1, stage="sft", launch={"engine": "single", "zero_stage": None, "num_processes": 1})
        write_recipe(folder / "done" / "recipe.yaml", {**BASE["recipes"]["sft"], "output_dir": "done"})


def write_recipe(path: Path, recipe: dict[str, Any]) -> None:
    """Write a recipe as JSON, which is YAML too."""
    path.write_text(json.dumps(recipe, indent=1), encoding="utf-8")


def snapshot(folder: Path) -> dict[str, bytes | str | None]:
    """Return the content of every file below a folder, the target of every link, and None for every folder."""
    return {
        str(path.relative_to(folder)): str(path.readlink())
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in sorted(folder.rglob("*"))
    }
