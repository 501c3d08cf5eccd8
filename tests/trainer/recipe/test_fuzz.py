"""Random recipes, overrides and sections: the loader and the checks raise InputError with one line, or nothing."""

import contextlib
import json
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rekatrain.data.errors import InputError
from rekatrain.trainer.recipe.load import Recipe, build_recipe, dump_recipe
from rekatrain.trainer.recipe.lora_keys import LORA_ALLOWED
from rekatrain.trainer.recipe.sections import check_sections
from rekatrain.trainer.recipe.trl_keys import SFT_ALLOWED
from rekatrain.trainer.recipe.yaml_text import parse_yaml
from rekatrain.trainer.rloo.config import RLOOConfig

MANY = settings(max_examples=150, deadline=None, derandomize=True)
FEW = settings(max_examples=30, deadline=None, derandomize=True)

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["", "auto", "x" * 300, "\0", "1e-6", -1, 0, 1, 10**30, 1e30, 0.5])
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner))
# Pieces that mean something to a YAML parser, in any order.
WORDS = "stage sft [ ] { } , &a *a <<: !!int !!set !x | > ' \" \\ # % --- ... 1e9 0x1 2026-01-01 null @ ` ~ ="
PIECES = st.sampled_from([*WORDS.split(), ": ", ":", "\n", "  ", "- ", "? ", "\t", "\ufeff", "\x07", "---\n"])
TEXTS = st.lists(PIECES | st.text(max_size=4), max_size=30).map("".join)
SECTION_KEYS = [field.name for field in fields(Recipe)]
GOOD = {
    "stage": "rloo",
    "output_dir": "run",
    "model": {"pretrained_model_name_or_path": "m"},
    "dataset": {"path": "rows.jsonl"},
    "rewards": {"reasoning_format": None},
    "rloo": {"max_steps": 1},
}


@contextlib.contextmanager
def only_input_error() -> Any:
    try:
        yield
    except InputError as error:
        assert str(error) and "\n" not in str(error)
        assert len(str(error)) < 5000


@MANY
@given(text=TEXTS | st.binary(max_size=40).map(lambda data: data.decode("latin-1")))
def test_yaml_of_any_text_is_plain_or_rejected(text: str) -> None:
    with only_input_error():
        value = parse_yaml(text, "PATH")
        json.dumps(value)


@MANY
@given(override=TEXTS | st.tuples(st.sampled_from(SECTION_KEYS), TEXTS).map("=".join))
def test_any_override_is_applied_or_rejected(override: str) -> None:
    with only_input_error():
        build_recipe(json.loads(json.dumps(GOOD)), [override])


@FEW
@given(tree=st.dictionaries(st.sampled_from(SECTION_KEYS) | st.text(max_size=6), VALUES, max_size=6))
def test_any_tree_is_a_recipe_or_rejected(tree: dict[str, Any]) -> None:
    with only_input_error():
        recipe = build_recipe({**json.loads(json.dumps(GOOD)), **tree})
        check_sections(recipe)
        dump_recipe(recipe)


@pytest.mark.parametrize(
    ("section", "keys"),
    [("sft", list(SFT_ALLOWED)), ("lora", list(LORA_ALLOWED)), ("rloo", [key.name for key in fields(RLOOConfig)])],
)
@FEW
@given(data=st.data())
def test_any_section_is_checked_or_rejected(section: str, keys: list[str], data: st.DataObject) -> None:
    values = data.draw(st.dictionaries(st.sampled_from(keys), VALUES, max_size=4))
    with only_input_error():
        recipe = build_recipe({**json.loads(json.dumps(GOOD)), section: {**GOOD.get(section, {}), **values}})
        check_sections(recipe)
