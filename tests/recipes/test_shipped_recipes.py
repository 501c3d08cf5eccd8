"""Every shipped recipe of CPU size trains for two steps, with a tiny model in place of the real one."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from rekatrain.data.errors import InputError
from rekatrain.trainer.cli import main
from rekatrain.trainer.plan.machine import current_launch
from rekatrain.trainer.plan.memory import make_plan
from rekatrain.trainer.recipe.load import load_recipe
from rekatrain.trainer.run.checkpoints import STATE_FILE
from tests.conftest import tiny_llama

FOLDER = Path(__file__).parents[2] / "recipes" / "smollm2"
RECIPES = sorted(FOLDER.glob("*.yaml"))
TRAINED = [path for path in RECIPES if path.stem != "sft-qlora"]


@pytest.fixture(scope="module")
def workspace(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, and with rows where the recipes look for them, as their scripts write them."""
    folder = tmp_path_factory.mktemp("shipped")
    model = tiny_llama(tokenizer)
    model.resize_token_embeddings(len(tokenizer))
    model.config.max_position_embeddings = 1024  # a row is long in a tokenizer of 300 ids
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [
        {"messages": [{"role": "user", "content": f"{n} + 1 ="}, {"role": "assistant", "content": str(n + 1)}]}
        for n in range(8)
    ]
    pairs = [
        {"instruction": f"{n} + 1 =", "input": "", "chosen": f"{n + 1}, dear", "rejected": str(n)} for n in range(20)
    ]
    for path, lines in (
        ("runs/quickstart/sft.jsonl", rows),
        ("runs/raft/made/rows.jsonl", rows),
        ("runs/reasoning/sft.jsonl", rows),
        ("runs/politeness/train.jsonl", pairs[:16]),
        ("runs/politeness/held_out.jsonl", pairs[16:]),
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_recipes_of_both_models_have_the_same_names() -> None:
    large = {path.stem for path in (FOLDER.parent / "reka-flash-3").glob("*.yaml")}
    same = {"sft": "sft-full", "rloo": "rloo-full", "rloo-lora": "rloo-8k"}
    # What is shown on a small model alone.
    series = ("raft-", "reasoning-", "mixture-")
    small = {same.get(path.stem, path.stem) for path in RECIPES if not path.stem.startswith(series)}
    assert small == large - {"rloo-16k", "rloo-32k"}  # a small model's completions are short in every stage
    methods = {"sft-lora", "sft-full", "sft-qlora", "reward", "rloo-full", "rloo-3.1"}
    assert large == methods | {"rloo-8k", "rloo-16k", "rloo-32k"}


@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.stem)
def test_recipe_trains_for_two_steps(path: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    stage = load_recipe(path).stage
    out = workspace / "out" / path.stem
    main(
        [
            "train",
            str(path),
            "model.pretrained_model_name_or_path=model",
            f"output_dir={out}",
            f"{stage}.max_steps=2",
            f"{stage}.save_steps=2",
        ]
    )
    state = json.loads((out / "checkpoints" / "checkpoint-2" / STATE_FILE).read_text())
    assert state["global_step"] == 2


def test_qlora_recipe_is_rejected_without_a_gpu() -> None:
    with pytest.raises(InputError, match="needs a GPU"):
        make_plan(load_recipe(FOLDER / "sft-qlora.yaml"), current_launch())
