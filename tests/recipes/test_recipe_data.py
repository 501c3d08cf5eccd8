"""The data of every 21B recipe, on rows with the columns of the public sets: layouts, filters, rewards, labels."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import PreTrainedTokenizerBase

from rekatrain.data.chat import IGNORED_LABEL
from rekatrain.data.mixture import load_mixture
from rekatrain.data.training_rows import encode_rows
from rekatrain.rewards.check.cases import GOLD, make_cases, run_cases
from rekatrain.rewards.compose import build_reward_functions
from rekatrain.rewards.gradable import check_source_columns, keep_gradable
from rekatrain.rewards.scoring import ScoringConfig
from rekatrain.trainer.recipe.load import Recipe, load_recipe
from tests.helpers.hub_rows import HUB, load_dataset

FOLDER = Path(__file__).parents[2] / "recipes" / "reka-flash-3"
RECIPES = {path.stem: load_recipe(path) for path in sorted(FOLDER.glob("*.yaml"))}
EVALUATED = [name for name, recipe in RECIPES.items() if recipe.stage == "rloo"]
TAGS = ("<think>", "</think>", "<|begin_of", "<|end_of")
WRONG = {"math_answer": "It is \\boxed{123456}.", "code_tests": "```python\nprint(input())\n```"}


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the public sets in place of the hub."""
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


def sections(recipe: Recipe) -> Iterator[dict[str, Any]]:
    for section in (recipe.dataset, recipe.eval_dataset):
        if section is not None:
            yield from section if isinstance(section, list) else [section]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_loads_each_of_its_public_sets(name: str) -> None:
    recipe = RECIPES[name]
    for section in sections(recipe):
        rows = load_mixture({key: value for key, value in section.items() if key != "weight"}).rows
        hub = HUB[section["path"]]
        held_out = isinstance(section.get("split"), dict)
        assert len(rows) == len(hub.rows) - hub.num_bad or held_out, section["path"]
        assert rows and all(row.messages[-1]["role"] == "assistant" for row in rows)


@pytest.mark.parametrize("name", EVALUATED)
def test_gold_earns_1_and_a_wrong_answer_0(name: str) -> None:
    recipe = RECIPES[name]
    functions = build_reward_functions(recipe.rewards)
    mixture = load_mixture(recipe.dataset)
    check_source_columns(functions, mixture.sources)
    rows = [*mixture.rows, *load_mixture(recipe.eval_dataset or [], "eval_dataset").rows]
    assert all(keep_gradable(functions, rows))
    golds = [case for case in make_cases(functions, rows, num_wrong=0) if case.kind == GOLD]
    # Each row has one gold, except those that a reward model judges.
    assert sorted(case.row.where for case in golds) == sorted(row.where for row in rows if row.source.name != "chat")
    wrong = [replace(case, kind="wrong", answer=WRONG[case.reward.name]) for case in golds]
    for case, outcome in run_cases([*golds, *wrong], ScoringConfig(num_workers=1, **recipe.scoring)):
        assert (outcome.value, outcome.error) == (float(case.kind == GOLD), ""), (case.row.where, case.answer)


def test_chat_prompts_are_judged_by_the_reward_model_alone() -> None:
    mixture = load_mixture(RECIPES["rloo-16k"].dataset)
    judges = {
        source.name: {name for name in RECIPES["rloo-16k"].rewards if source.is_judged_by(name)}
        for source in mixture.sources
    }
    assert judges == {
        "dapo": {"math_answer"},
        "numina": {"math_answer"},
        "code": {"code_tests"},
        "chat": {"remote_reward_model"},
    }


def test_prompts_of_the_sft_data_are_left_out_of_rloo_3_1(caplog: pytest.LogCaptureFixture) -> None:
    hub = HUB["AI-MO/NuminaMath-1.5"].rows
    hub.append({**hub[0], "problem": HUB["open-r1/OpenR1-Math-220k"].rows[7]["problem"]})
    try:
        rows = load_mixture(RECIPES["rloo-3.1"].dataset).rows
    finally:
        hub.pop()
    assert "What is 7 + 7?" not in {row.messages[-2]["content"] for row in rows}
    assert any("How many diagonals" in row.messages[-2]["content"] for row in rows)


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.stage == "sft"])
def test_sft_recipe_trains_thoughts_without_their_tags(name: str, cl100k: PreTrainedTokenizerBase) -> None:
    recipe = RECIPES[name]
    rows = load_mixture(recipe.dataset).rows
    held_out = {row.messages[-2]["content"] for row in load_mixture(recipe.eval_dataset or {}, "eval_dataset").rows}
    assert held_out and held_out.isdisjoint(row.messages[-2]["content"] for row in rows)
    by_source: dict[str, list[str]] = {}
    for row in rows:
        for encoded in encode_rows([row], cl100k, recipe.sft["max_length"]):
            text = cl100k.decode(encoded.input_ids)
            assert not any(tag in text for tag in TAGS) and "Your role as an assistant" not in text
            trained = [label for label in encoded.labels if label != IGNORED_LABEL]
            by_source.setdefault(row.source.name, []).append(cl100k.decode(trained))
    assert by_source["thoughts"][0] == (
        " <reasoning>\n7 times 13 is 91.\n</reasoning>\n\nNo: $91 = 7 \\cdot 13$. <sep>"
    )
    assert all(text.startswith(" <reasoning>\nDoubling") and text.endswith("}$. <sep>") for text in by_source["math"])
    assert set(by_source["chat"]) == {" Hello. What can I do for you? <sep> The trout. <sep>"}


def test_reward_recipe_compares_answers_of_ultrafeedback() -> None:
    rows = load_mixture(RECIPES["reward"].dataset).rows
    assert [(row.messages[-1]["content"], (row.rejected or [])[-1]["content"]) for row in rows] == [
        ("Blue, like the sky.", "no"),
        ("Hello! How are you?", "What?"),
    ]
