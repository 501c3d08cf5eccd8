"""The documentation keeps its promises: commands run or parse, Python runs, links, paths and keys exist."""

import importlib.util
import inspect
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import trl
from ruamel.yaml import YAML
from transformers import PreTrainedTokenizerFast

from rekatrain.data.chat import FinishReason, ParsedCompletion
from rekatrain.data.options import check_keywords
from rekatrain.data.sources import load_rows
from rekatrain.rewards.compose import build_reward_functions
from rekatrain.trainer import api, cli
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.rloo.config import RLOOConfig
from tests.conftest import tiny_llama

PROJECT = Path(__file__).parents[1]
README = PROJECT / "README.md"
SKIPPED_FOLDERS = {".venv", ".venv-vllm", ".git", ".github", ".package", "runs", "exports"}
PAGES = sorted(path for path in PROJECT.rglob("*.md") if not SKIPPED_FOLDERS & set(path.relative_to(PROJECT).parts))
# Old names, and a page of the user's own.
NO_PATHS = {"CHANGELOG.md"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
KEY = re.compile(r"`([a-z_.0-9]+)")


def fences(page: Path, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(page.read_text(encoding="utf-8")) if language in languages]


def commands() -> Iterator[tuple[str, list[str]]]:
    """Each command line of a fenced block as (page, words): continued lines joined, variables and comments removed."""
    for page in PAGES:
        for block in fences(page, "", "bash"):
            for line in block.replace("\\\n", " ").replace("$gpu", "4").splitlines():
                try:
                    words = shlex.split(line, comments=True)
                except ValueError:  # a drawing or a conversation
                    continue
                while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                    words = words[1:]
                words = words[:-1] if words[-1:] == ["&"] else words
                if words and words[0] in ("rekatrain", "python", "accelerate", "bash", "pip") and "[" not in line[:40]:
                    yield page.relative_to(PROJECT).as_posix(), words


def of_program(*programs: str) -> list[Any]:
    return [
        pytest.param(words, id=f"{page}:{' '.join(words)[:70]}") for page, words in commands() if words[0] in programs
    ]


def table(page: Path, first_column: str) -> list[list[str]]:
    """Cells of the rows of the table whose head begins with `first_column`."""
    lines = iter(page.read_text(encoding="utf-8").splitlines())
    next(line for line in lines if line.startswith(f"| {first_column} |"))
    next(lines)
    rows = []
    while (line := next(lines, "")).startswith("|"):
        rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return rows


def anchor(heading: str) -> str:
    """Name that a Markdown viewer gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.fixture(scope="module")
def workspace(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as after the SFT of the quickstart, with a tiny model in place of SmolLM2."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "recipes").symlink_to(PROJECT / "recipes")
    model = tiny_llama(tokenizer)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder / "runs" / "quickstart" / "sft-export")
    tokenizer.save_pretrained(folder / "runs" / "quickstart" / "sft-export")
    return folder


def run_python(arguments: list[str], folder: Path, source: str | None = None) -> str:
    finished = subprocess.run(
        [sys.executable, *arguments], input=source, capture_output=True, text=True, check=False, cwd=folder
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    return finished.stdout


# ---- Links and paths


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(PROJECT).as_posix())
def test_page_names_existing_files(page: Path) -> None:
    text = re.sub(r"<!--.*?-->", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, heading = target.partition("#")
        linked = page.parent / path if path else page
        assert linked.exists(), f"no {target}"
        if heading:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in map(anchor, headings), f"no heading {target}"
    if page.name not in NO_PATHS:
        for path in re.findall(r"`((?:recipes|trainer|data|rewards|tests)/[a-z\d_./-]*)`", text):  # not rewards/NAME
            assert (PROJECT / path).exists() or (page.parent / path).exists(), f"no {path}"


def test_readme_is_short() -> None:
    assert len(README.read_text(encoding="utf-8").split()) <= 1250


# ---- Commands


def check_command_line(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the command line up to the function that does the work, with the recipe and its overrides loaded."""
    calls = []

    def record(name: str) -> Any:
        def called(*positional: object, **keywords: object) -> bool:
            calls.append(name)
            if name in ("train", "evaluate", "sample"):
                api.check_recipe(*positional)  # type: ignore[arg-type]
            return name != "launch"  # whose result is run

        return called

    for name in ("train", "evaluate", "sample", "export"):
        monkeypatch.setattr(api, name, record(name))
    monkeypatch.setattr("rekatrain.trainer.plan.plan.plan", record("plan"))
    monkeypatch.setattr("rekatrain.trainer.launch.launch.launch", record("launch"))
    monkeypatch.setattr("rekatrain.trainer.rloo.sampler.vllm.serve.serve_rollouts", record("serve-rollouts"))
    monkeypatch.setattr("rekatrain.trainer.recipe.shipped.write_recipes", record("recipes"))
    monkeypatch.setattr("rekatrain.trainer.chat.chat", record("chat"))
    monkeypatch.chdir(PROJECT)
    try:
        cli.main([word for word in arguments if word != "..."])
    except SystemExit as end:
        assert end.code == 0, arguments
    assert calls == [arguments[0]]


@pytest.mark.parametrize("words", of_program("rekatrain"))
def test_rekatrain_command_parses(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    check_command_line(words[1:], monkeypatch)


@pytest.mark.parametrize("words", of_program("accelerate"))
def test_accelerate_command_parses(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.commands.launch import launch_command_parser

    assert words[1] == "launch"
    options = launch_command_parser().parse_args(words[2:])
    assert options.module and options.training_script == "rekatrain"
    assert options.config_file is None or (PROJECT / options.config_file).exists()
    check_command_line(options.training_script_args, monkeypatch)


@pytest.mark.parametrize("words", of_program("python", "bash", "pip"))
def test_other_command_names_existing_files_and_options(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if words[:3] == ["python", "-m", "rekatrain"]:
        return check_command_line(words[3:], monkeypatch)
    for word in words[1:]:
        if re.match(r"(recipes|tests)/", word):
            assert (PROJECT / word).exists(), f"no {word}"
    if words[0] == "python" and words[1].startswith(("recipes/", "tests/")):
        script = PROJECT / words[1]
        sources = "".join(path.read_text() for path in script.parent.glob("*.py"))
        for option in words[2:]:
            if option.startswith("--") and option != "--help":
                assert f'"{option}"' in sources, f"{words[1]} has no {option}"
    return None


@pytest.mark.slow
@pytest.mark.launched
def test_dry_run_of_the_readme_prints_the_recipe(workspace: Path) -> None:
    assert ["rekatrain", "train", "recipes/smollm2/rloo.yaml", "--dry-run"] in [words for _, words in commands()]
    printed = run_python(["-m", "rekatrain", "train", "recipes/smollm2/rloo.yaml", "--dry-run"], workspace)
    assert "num_generations: 8" in printed


@pytest.mark.slow
@pytest.mark.launched
def test_plan_of_the_readme_fits(workspace: Path) -> None:
    (command,) = [words for page, words in commands() if page == "README.md" and words[:2] == ["rekatrain", "plan"]]
    assert "GB" in run_python(["-m", *command], workspace)


@pytest.mark.launched
def test_recipes_command_writes_loadable_recipes(workspace: Path) -> None:
    run_python(["-m", "rekatrain", "recipes", "my-recipes"], workspace)
    assert (workspace / "my-recipes" / "one_file" / "rloo.py").exists()
    recipe = api.check_recipe(workspace / "my-recipes" / "smollm2" / "rloo.yaml")
    assert recipe.stage == "rloo"


# ---- Python and YAML


@pytest.mark.slow
@pytest.mark.launched
def test_python_of_the_readme_trains_evaluates_and_exports(workspace: Path) -> None:
    (source,) = [block for block in fences(README, "python") if "from rekatrain import" in block]
    run_python(["-"], workspace, source)
    assert (workspace / "exports" / "my-model" / "config.json").exists()
    lines = (workspace / "runs" / "quickstart" / "rloo" / "metrics.jsonl").read_text().splitlines()
    trained = [record for record in map(json.loads, lines) if "reward" in record]
    assert [record["step"] for record in trained] == [1, 2, 3]
    for cell, *_ in table(PROJECT / "trainer" / "rloo" / "README.md", "metric"):
        for name in re.findall(r"`([^`]+)`", cell):
            assert name.replace("NAME", "math_answer") in trained[0], f"no metric {name}"


def test_reward_of_the_readme_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = [block for block in fences(README, "python") if "my_rewards.py" in block]
    (tmp_path / "my_rewards.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (rewards,) = [tree["rewards"] for tree in yaml_blocks() if "rewards" in tree]
    assert [reward.name for reward in build_reward_functions(rewards)] == ["math_answer", "my_rewards:brevity"]
    scope: dict[str, Any] = {}
    exec(source, scope)
    completion = ParsedCompletion(reasoning=None, answer="x" * 60, finish_reason=FinishReason.STOP)
    assert [scope["brevity"](completion), scope["brevity"](completion, limit=80)] == [0.0, 1.0]


def test_dataset_of_the_readme_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (dataset,) = [tree["dataset"] for tree in yaml_blocks() if "dataset" in tree]
    check_keywords("dataset", dataset, load_rows)
    example = re.search(r"path: train.jsonl +# (\{.*\})", README.read_text(encoding="utf-8"))
    assert example is not None
    (tmp_path / "train.jsonl").write_text(example[1] + "\n")
    monkeypatch.chdir(tmp_path)
    assert [row.columns["answer"] for row in load_rows(**dataset).rows] == ["42"]


def yaml_blocks() -> list[dict[str, Any]]:
    return [YAML(typ="safe", pure=True).load(block) for block in fences(README, "yaml")]


# ---- Tables of keys


def test_migration_table_names_real_keys() -> None:
    ours = {field.name for field in fields(RLOOConfig)}
    sections = {field.name for field in fields(Recipe)}
    theirs = {field.name for field in fields(trl.RLOOConfig)}
    arguments = inspect.signature(trl.RLOOTrainer).parameters
    rows = table(PROJECT / "recipes" / "README.md", "ours")
    assert len(rows) > 20
    for our_cell, trl_cell, *_ in rows:
        for key in KEY.findall(our_cell):
            section, dot, _ = key.partition(".")
            assert key in ours or (section in sections if dot else key in sections) or key == "serve", f"no key {key}"
        for argument, key in re.findall(r"(argument )?`([a-z_0-9]+)`", trl_cell):
            assert key in (arguments if argument else theirs), f"TRL has no {key}"


def test_options_table_names_real_keys() -> None:
    ours = {field.name for field in fields(RLOOConfig)}
    for cell, *_ in table(PROJECT / "trainer" / "rloo" / "README.md", "key"):
        assert set(KEY.findall(cell)) <= ours


def test_phases_of_the_step_are_those_of_its_page() -> None:
    folder = PROJECT / "trainer" / "rloo"
    in_code = re.findall(r"(?:# |\. )(\d)\. [A-Z]", (folder / "step.py").read_text(encoding="utf-8"))
    on_page = re.findall(r"^(\d)\. ", (folder / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert in_code == on_page == list("12345678")


def test_changelog_names_existing_modules() -> None:
    modules = re.findall(r"`(rekatrain\.[\w.]+)`", (PROJECT / "CHANGELOG.md").read_text(encoding="utf-8"))
    assert len(modules) > 15
    for module in modules:
        assert importlib.util.find_spec(module), f"no {module}"


# ---- Workflows


@pytest.mark.parametrize(
    "workflow", sorted((PROJECT / ".github" / "workflows").glob("*.yml")), ids=lambda path: path.stem
)
def test_workflow_runs_existing_scripts(workflow: Path) -> None:
    jobs = YAML(typ="safe", pure=True).load(workflow)["jobs"]
    commands = [step["run"].split() for job in jobs.values() for step in job["steps"] if "run" in step]
    scripts = [words[words[0] == "bash"] for words in commands if words[0] != "sudo"]
    assert scripts
    assert all((PROJECT / script).is_file() for script in scripts)
