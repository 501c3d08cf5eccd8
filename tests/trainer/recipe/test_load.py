"""Recipes: their YAML, the messages for mistakes, and every shipped recipe."""

import re
import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rekatrain.data.errors import InputError
from rekatrain.data.options import check_keywords
from rekatrain.trainer.recipe.load import Recipe, dump_recipe, flatten, load_recipe
from rekatrain.trainer.recipe.sections import check_sections
from rekatrain.trainer.recipe.trl_keys import TRL_RESERVED
from rekatrain.trainer.recipe.upstream import check_sft
from rekatrain.trainer.run.folder import RECIPE_FILE, RunFolder

ROOT = Path(__file__).parents[3]
# recipes/accelerate holds launch files, which are Accelerate's.
SHIPPED = [path for path in sorted((ROOT / "recipes").glob("**/*.yaml")) if path.parent.name != "accelerate"]

SHORTEST = "stage: rloo\noutput_dir: run\nmodel: {pretrained_model_name_or_path: m}\ndataset: {path: rows.jsonl}\n"


def read(tmp_path: Path, text: str, *overrides: str) -> Recipe:
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
    return load_recipe(tmp_path / "recipe.yaml", overrides)


def error_of(tmp_path: Path, text: str, *overrides: str) -> str:
    """Return the message of the error that the recipe raises, with PATH for the recipe's own path."""
    with pytest.raises(InputError) as caught:
        read(tmp_path, text, *overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message.replace(str(tmp_path / "recipe.yaml"), "PATH")


# Files


def test_shortest_recipe_has_these_defaults(tmp_path):
    assert read(tmp_path, SHORTEST) == Recipe(
        stage="rloo",
        output_dir="run",
        model={"pretrained_model_name_or_path": "m"},
        dataset={"path": "rows.jsonl"},
        seed=0,
        lora=None,
        chat={},
        eval_dataset=None,
        sft={},
        rloo={},
        rewards={},
        evaluate={},
        wandb=None,
    )


@pytest.mark.parametrize(
    ("scalar", "value"),
    [
        ("1e-6", 1e-6),
        ("5E3", 5000.0),
        (".5", 0.5),
        ("1.", 1.0),
        ("no", "no"),
        ("off", "off"),
        ("yes", "yes"),
        ("012", 12),
        ("0o14", 12),
        ("12:30", "12:30"),
        ("true", True),
        ("null", None),
        ("~", None),
        ("'1'", "1"),
        ("", None),
    ],
)
def test_scalars_follow_yaml_1_2(tmp_path, scalar, value):
    for recipe in (
        read(tmp_path, SHORTEST + f"wandb:\n  key: {scalar}\n"),
        read(tmp_path, SHORTEST, f"wandb.key={scalar}"),
    ):
        assert recipe.wandb == {"key": value}
        assert type(recipe.wandb["key"]) is type(value)


def test_section_may_be_merged_from_another(tmp_path):
    text = SHORTEST.replace("dataset:", "dataset: &rows") + "eval_dataset:\n  <<: *rows\n  limit: 3\n"
    assert read(tmp_path, text).eval_dataset == {"path": "rows.jsonl", "limit": 3}


MISTAKES = {
    "not a mapping": ("- stage\n", "PATH: a recipe is a mapping of sections, not list"),
    "empty": ("", "PATH: a recipe is a mapping of sections, not NoneType"),
    "unknown section": (SHORTEST + "lorra: {}\n", "unknown key lorra: did you mean lora?"),
    "far from any": (
        SHORTEST + "zzz: 1\n",
        "unknown key zzz: known keys: " + ", ".join(sorted(key.name for key in fields(Recipe))),
    ),
    "missing key": (SHORTEST.replace("output_dir: run\n", ""), "output_dir is missing: add it to the recipe"),
    "wrong stage": (SHORTEST.replace("rloo", "dpo"), "stage is 'dpo'; it should be 'sft', 'reward' or 'rloo'"),
    "text for a number": (SHORTEST + "seed: one\n", "seed is 'one'; it should be a valid integer"),
    "number for text": (SHORTEST.replace("run\n", "7\n"), "output_dir is 7; it should be a valid string"),
    "list for a section": (SHORTEST + "sft: [1]\n", "sft is [1]; it should be a valid dictionary"),
    "null for a section that is needed": (
        SHORTEST.replace("{path: rows.jsonl}", "null"),
        "dataset is None; it should be a valid dictionary or be a valid list",
    ),
}


@pytest.mark.parametrize(("text", "message"), MISTAKES.values(), ids=MISTAKES)
def test_load_recipe_rejects_with_this_message(tmp_path, text, message):
    assert error_of(tmp_path, text) == message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (SHORTEST + "seed: 1\nseed: 2\n", ["duplicate key", "seed"]),
        (SHORTEST + "rloo: {beta: 1, beta: 2}\n", ["duplicate key", "beta"]),
        (SHORTEST + "rloo: {beta: 1\n", ["line"]),
        (SHORTEST + "rloo:\n\tbeta: 1\n", ["line"]),
        (SHORTEST + "a: !!python/object/apply:os.getcwd []\n", ["python/object"]),
        ("stage: rloo\n---\nstage: sft\n", ["document"]),
    ],
)
def test_invalid_yaml_is_reported_on_one_line(tmp_path, text, parts):
    message = error_of(tmp_path, text)
    assert message.startswith("PATH is not valid YAML: ")
    assert all(part in message for part in parts)


def test_load_recipe_reports_a_file_that_is_missing_or_not_text(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="^no recipe at '/nowhere/recipe.yaml'$"):
        load_recipe("/nowhere/recipe.yaml")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="to write the shipped recipes there: rekatrain recipes recipes$"):
        load_recipe("recipes/smollm2/rloo.yaml")
    with pytest.raises(InputError, match="^the recipe .* cannot be read: "):
        load_recipe(tmp_path)
    (tmp_path / "recipe.yaml").write_bytes(b"stage: \xff")
    with pytest.raises(InputError, match="^the recipe .* cannot be read: "):
        load_recipe(tmp_path / "recipe.yaml")


# Overrides


def test_overrides_set_values_and_make_and_remove_sections(tmp_path):
    text = SHORTEST + "lora: {r: 8}\nrloo: {max_steps: 3, beta: 0.5}\n"
    recipe = read(
        tmp_path,
        text,
        "lora=null",
        "rloo.beta=1e-2",
        "rloo.learning_rate=5e-6",
        "eval_dataset.path=a=b.jsonl",
        "dataset.task.max_terms=2",
        "rewards={math_answer: {weight: 2}}",
        "seed=1",
        "seed=2",
    )
    assert recipe.lora is None
    assert recipe.rloo == {"max_steps": 3, "beta": 0.01, "learning_rate": 5e-6}
    assert recipe.eval_dataset == {"path": "a=b.jsonl"}
    assert recipe.dataset == {"path": "rows.jsonl", "task": {"max_terms": 2}}
    assert recipe.rewards == {"math_answer": {"weight": 2}}
    assert recipe.seed == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "'seed' is not an override; write dotted.key=value"),
        ("=1", "'=1' is not an override; write dotted.key=value"),
        ("--resume", "'--resume' is not an override; write dotted.key=value"),
        ("stage.x=1", "'stage.x=1': stage is a value, not a section"),
        ("rloo.beta.x.y=1", "'rloo.beta.x.y=1': rloo.beta is a value, not a section"),
        ("sede=1", "unknown key sede: did you mean seed?"),
        ("seed=x", "seed is 'x'; it should be a valid integer"),
        ("seed=", "seed is None; it should be a valid integer"),
        ("stage=null", "stage is None; it should be 'sft', 'reward' or 'rloo'"),
    ],
)
def test_override_that_is_bad_is_rejected_with_this_message(tmp_path, override, message):
    assert error_of(tmp_path, SHORTEST + "rloo: {beta: 1}\n", override) == message


def test_override_that_is_not_yaml_is_reported(tmp_path):
    assert error_of(tmp_path, SHORTEST, "rloo={beta: 1").startswith("the override 'rloo={beta: 1' is not valid YAML: ")


# Saved recipes


# ruamel.yaml writes U+0085 as a line break and reads a space.
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\x85"), max_size=6)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | TEXTS
    | st.sampled_from(
        ["no", "off", "1e-6", "012", "null", "~", "1_000", "", " ", "a: b", "- a", "#", "'", '"', "a\nb", "1:2"]
    )
)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3))
SECTIONS = st.dictionaries(TEXTS.filter(bool), VALUES, max_size=3)
RECIPES = st.builds(
    Recipe,
    stage=st.sampled_from(["sft", "rloo"]),
    output_dir=TEXTS,
    model=SECTIONS.filter(bool),
    dataset=SECTIONS.filter(bool),
    seed=st.integers(),
    lora=st.none() | SECTIONS.filter(bool),
    rloo=SECTIONS,
    rewards=st.dictionaries(TEXTS.filter(bool), st.none() | SECTIONS, max_size=3),
    wandb=st.none() | SECTIONS.filter(bool),
)


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
@given(recipe=RECIPES)
def test_dumped_recipe_loads_as_itself(tmp_path, recipe):
    assert read(tmp_path, dump_recipe(recipe)) == recipe


@pytest.mark.parametrize("section", ["lora", "eval_dataset", "wandb"])
def test_section_without_options_stays_on(tmp_path, section):
    recipe = read(tmp_path, SHORTEST + f"{section}: {{}}\n")
    assert getattr(recipe, section) == {}
    assert getattr(read(tmp_path, dump_recipe(recipe)), section) == {}


def test_run_folder_keeps_the_resolved_recipe(tmp_path):
    recipe = read(
        tmp_path, SHORTEST + "lora: {r: 8}\n", "lora=null", "rloo.beta=1e-2", f"output_dir={tmp_path / 'run'}"
    )
    run = RunFolder(recipe.output_dir)
    run.start(recipe, 0)
    stored = load_recipe(run.path / RECIPE_FILE)
    assert stored == recipe
    assert (stored.lora, stored.rloo, stored.seed) == (None, {"beta": 0.01}, 0)


def test_flatten_gives_dotted_keys(tmp_path):
    recipe = read(tmp_path, SHORTEST + "rloo: {beta: 2}\n", "seed=1", "dataset.task={a: 1}")
    flat = flatten(asdict(recipe))
    assert {key: flat[key] for key in ("dataset.task.a", "rloo.beta", "seed", "lora", "chat")} == {
        "dataset.task.a": 1,
        "rloo.beta": 2,
        "seed": 1,
        "lora": None,
        "chat": {},
    }


# Sections


def target(*, learning_rate: float, steps: int = 1, name: str | None = None, output: str = "") -> None:
    """A callable for a section."""


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"learning_rat": 0.1}, "unknown key s.learning_rat: did you mean s.learning_rate?"),
        ({"zzz": 0.1}, "unknown key s.zzz: known keys: learning_rate, name, steps"),
        ({"learning_rate": 0.1, "output": "x"}, "s.output is set by the program: remove it from the recipe"),
        ({"steps": 1}, "s.learning_rate is missing: add it to the recipe"),
        ({"learning_rate": "0.1"}, "s.learning_rate is '0.1'; it should be a valid number"),
        ({"learning_rate": 0.1, "steps": 1.5}, "s.steps is 1.5; it should be a valid integer"),
        ({"learning_rate": 0.1, "steps": True}, "s.steps is True; it should be a valid integer"),
        ({"learning_rate": 0.1, "name": 3}, "s.name is 3; it should be a valid string"),
        ({7: 0.1}, "unknown key s.7: known keys: learning_rate, name, steps"),
    ],
)
def test_check_keywords_rejects_with_this_message(section, message):
    with pytest.raises(InputError) as caught:
        check_keywords("s", section, target, reserved=["output"])
    assert str(caught.value) == message


def test_check_keywords_accepts_a_good_section():
    check_keywords("s", {"learning_rate": 1, "steps": 2, "name": None}, target, reserved=["output"])


@pytest.mark.parametrize("key", TRL_RESERVED)
def test_sft_section_cannot_set_a_reserved_key(key):
    with pytest.raises(InputError, match=f"^sft.{key} is set by the program: remove it from the recipe$"):
        check_sft({key: None})


# The shipped recipes


def test_shipped_recipes_cover_every_stage():
    assert {load_recipe(path).stage for path in SHIPPED} == {"sft", "reward", "rloo"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_recipe_passes_every_check(path, tmp_path, monkeypatch):
    (tmp_path / "runs" / "multi-task" / "reward-export").mkdir(parents=True)  # an earlier command writes it
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(path)
    check_sections(recipe)
    assert read(tmp_path, dump_recipe(recipe)) == recipe


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_recipe_opens_with_its_command(path):
    comments = [line for line in path.read_text(encoding="utf-8").split("\nstage:")[0].splitlines()]
    assert all(line.startswith("#") for line in comments)
    assert any(re.search(rf"rekatrain \w+ {path.relative_to(ROOT)}", line) for line in comments)
    (line,) = [line for line in comments if line.startswith("# Useful overrides: ")]
    overrides = line.removeprefix("# Useful overrides: ").replace("'", "").split(", ")
    assert len(overrides) >= 3


# Speed


def run_without_torch(code: str) -> None:
    """Run the code in a separate process; it calls `check(DONE)` where torch must not have been imported."""
    check = "import sys\ndef check(done):\n    if 'torch' in sys.modules: sys.exit(f'torch is imported after {done}')\n"
    done = subprocess.run([sys.executable, "-c", check + code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_loading_a_recipe_and_data_imports_no_torch(tmp_path):
    (tmp_path / "recipe.yaml").write_text(SHORTEST)
    run_without_torch(
        "import importlib\n"
        "import rekatrain.trainer.cli, rekatrain.trainer.recipe, rekatrain.trainer.rloo.config\n"
        "check('the command line')\n"
        f"rekatrain.trainer.recipe.load.load_recipe({str(tmp_path / 'recipe.yaml')!r})\n"
        "check('a recipe')\n"
        "for name in ('chat', 'stop', 'tokenizer', 'rows', 'layouts', 'sources'):\n"
        "    importlib.import_module(f'rekatrain.data.{name}')\n"
        "    check(f'rekatrain.data.{name}')\n"
    )


def test_wrong_keys_are_reported_before_torch_is_imported(tmp_path):
    (tmp_path / "recipe.yaml").write_text(SHORTEST + "rewards: {math_answer: null}\n")
    run_without_torch(
        "import rekatrain\n"
        "for override in ('rloo.num_generation=4', 'dataset.pth=x', 'lorra={}', 'rewards={math_answr: null}'):\n"
        "    try:\n"
        f"        rekatrain.train({str(tmp_path / 'recipe.yaml')!r}, override)\n"
        "    except rekatrain.InputError:\n"
        "        check(override)\n"
        "    else:\n"
        "        sys.exit(override)\n"
    )


@pytest.mark.parametrize("key", ["logging_first_step", "push_to_hub", "num_train_epoch"])
def test_unknown_key_gets_no_far_fetched_hint(key, tmp_path):
    recipe = read(tmp_path, SHORTEST + f"rewards: {{math_answer: null}}\nrloo: {{max_steps: 1, {key}: 1}}\n")
    with pytest.raises(InputError, match=f"^unknown key rloo.{key}: known keys: "):
        check_sections(recipe)


@pytest.mark.parametrize(
    ("key", "ours"),
    [("kl_coef", "beta"), ("lr", "learning_rate"), ("max_response_length", "max_completion_length")],
)
def test_unknown_key_of_another_library_names_ours(key, ours, tmp_path):
    recipe = read(tmp_path, SHORTEST + f"rewards: {{math_answer: null}}\nrloo: {{max_steps: 1, {key}: 1}}\n")
    with pytest.raises(InputError, match=rf"^unknown key rloo.{key}: did you mean rloo.{ours}\?$"):
        check_sections(recipe)
