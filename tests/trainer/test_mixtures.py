"""Data sets of several sources in recipes and runs: shares, orders, held-out rows, and rewards by source."""

import json
from pathlib import Path
from typing import Any

import pytest

from rekatrain.data.errors import InputError
from rekatrain.trainer import sft
from rekatrain.trainer.recipe.load import Recipe, build_recipe, dump_recipe, load_recipe
from rekatrain.trainer.recipe.sections import check_sections
from rekatrain.trainer.rloo.setup import prepare
from rekatrain.trainer.rloo.train import train
from tests.conftest import write_jsonl

REWARDS = """
def long_enough(completion):
    return float(len(completion.answer) > 3)

def first_letter(completion, *, letter):
    return float(completion.answer.startswith(letter))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mixed_rewards.py").write_text(REWARDS)
    write_jsonl(tmp_path / "sums.jsonl", *({"prompt": f"{n}+{n}?", "answer": 2 * n, "level": -n} for n in range(6)))
    write_jsonl(tmp_path / "words.jsonl", *({"prompt": f"Say {c}", "letter": c, "level": 9, "answer": c} for c in "ab"))
    return tmp_path


def recipe_of(model_folder: Path, stage: str, dataset: Any, **sections: Any) -> Recipe:
    tree = {
        "stage": stage,
        "output_dir": "run",
        "model": {"pretrained_model_name_or_path": str(model_folder), "dtype": "float32"},
        "dataset": dataset,
        **sections,
    }
    recipe = build_recipe(tree)
    check_sections(recipe)
    return recipe


SUMS = {"path": "sums.jsonl", "format": "prompt_answer"}
WORDS = {"path": "words.jsonl", "format": "prompt_answer", "source": "letters"}
RLOO = {"max_steps": 2, "prompts_per_step": 4, "num_generations": 2, "max_completion_length": 4, "save_steps": 2}


def test_rewards_of_a_run_judge_their_sources(model_folder: Path, folder: Path) -> None:
    dataset = [
        {**SUMS, "weight": 1, "rewards": ["mixed_rewards:long_enough"]},
        {**WORDS, "weight": 1, "rewards": ["mixed_rewards:first_letter"]},
    ]
    rewards = {"mixed_rewards:long_enough": None, "mixed_rewards:first_letter": None}
    recipe = recipe_of(
        model_folder, "rloo", dataset, rewards=rewards, scoring={"num_workers": 1}, rloo={**RLOO, "beta": 0.0}
    )
    assert [prompt.row.source.name for prompt in prepare(recipe).prompts] == ["sums"] * 4 + ["letters"] * 4
    train(recipe, resume=False)

    records = [json.loads(line) for line in (folder / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert {record["source"] for record in records} == {"sums", "letters"} and len(records) == 16
    for record in records:
        judged, other = list(rewards) if record["source"] == "sums" else list(rewards)[::-1]
        assert record["rewards"][judged] is not None and record["rewards"][other] is None
        assert record["reward"] == record["rewards"][judged]
    for number, line in enumerate((folder / "run" / "metrics.jsonl").read_text().splitlines(), start=1):
        metrics = json.loads(line)
        for source in ("sums", "letters"):
            scores = [r["reward"] for r in records if r["source"] == source and r["step"] == number]
            if scores:
                assert metrics[f"reward/{source}"] == pytest.approx(sum(scores) / len(scores))


def test_rloo_needs_columns_only_where_they_are_judged(model_folder: Path, folder: Path) -> None:
    rewards = {"mixed_rewards:first_letter": None, "mixed_rewards:long_enough": None}
    dataset = [{**SUMS, "rewards": ["mixed_rewards:long_enough"]}, WORDS]
    prepare(recipe_of(model_folder, "rloo", dataset, rewards=rewards, rloo=RLOO))
    dataset = [{**SUMS, "rewards": ["mixed_rewards:first_letter"]}, {**WORDS, "rewards": ["mixed_rewards:long_enough"]}]
    with pytest.raises(InputError, match="first_letter needs the column letter, which the rows do not have"):
        prepare(recipe_of(model_folder, "rloo", dataset, rewards=rewards, rloo=RLOO))


def test_order_by_a_column_holds_in_all_stages(model_folder: Path, folder: Path) -> None:
    dataset = {"sources": [SUMS, WORDS], "order": {"by": "level"}}
    setup = prepare(recipe_of(model_folder, "rloo", dataset, rewards={"reasoning_format": None}, rloo=RLOO))
    assert [prompt.row.columns["level"] for prompt in setup.prompts] == [-5, -4, -3, -2, -1, 0, 9, 9]
    assert not setup.is_shuffled
    task = sft.prepare(recipe_of(model_folder, "sft", dataset, sft={"max_steps": 1}))
    assert task.config.train_sampling_strategy == "sequential"
    assert task.tokenizer.decode(task.rows[0].input_ids).startswith("human: 5+5?")
    assert sft.prepare(recipe_of(model_folder, "sft", [SUMS], sft={"max_steps": 1})).config.train_sampling_strategy == (
        "random"
    )
    with pytest.raises(InputError, match="sft.packing is True, but dataset.order keeps an order"):
        sft.prepare(recipe_of(model_folder, "sft", dataset, sft={"max_steps": 1, "packing": True}))


def test_split_of_a_recipe_is_its_eval_dataset(model_folder: Path, folder: Path) -> None:
    dataset = [{**SUMS, "split": {"eval": 0.5}}, WORDS]
    recipe = recipe_of(model_folder, "sft", dataset, sft={"max_steps": 1})
    assert recipe.eval_dataset == [{**SUMS, "split": {"eval": 0.5, "part": "eval"}}]
    Path("saved.yaml").write_text(dump_recipe(recipe))
    assert load_recipe("saved.yaml") == recipe
    with pytest.raises(InputError, match="dataset.split holds rows out, and the recipe has an eval_dataset"):
        recipe_of(model_folder, "sft", dataset, eval_dataset=WORDS)


def test_overrides_reach_a_source_by_its_index(model_folder: Path, folder: Path) -> None:
    tree = {"stage": "sft", "output_dir": "run", "model": {}, "dataset": [dict(SUMS), dict(WORDS)]}
    assert build_recipe(tree, ["dataset.1.limit=1"]).dataset == [SUMS, {**WORDS, "limit": 1}]
    for wrong in ("dataset.2.limit=1", "dataset.path=a"):
        with pytest.raises(InputError, match="is no index of a list with 2 items, from 0"):
            build_recipe(tree, [wrong])
