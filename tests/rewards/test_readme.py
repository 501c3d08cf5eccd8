"""The examples of rewards/README.md run as they are written."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from rekatrain.rewards import build_reward_functions
from rekatrain.rewards.grader import Grader
from rekatrain.rewards.registry import REWARDS, read_signature
from rekatrain.trainer.cli import main

PROJECT = Path(__file__).parents[2]
README = (PROJECT / "rewards" / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(python|yaml)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# What a recipe needs besides the sections of the example.
REST = """
stage: rloo
output_dir: run
model: {{pretrained_model_name_or_path: "{model}", dtype: float32}}
rloo: {{max_steps: 1, num_generations: 2, max_completion_length: 4}}
"""


def blocks(heading: str, language: str) -> list[str]:
    """Return the code blocks of a section, its subsections included."""
    level = heading.partition(" ")[0]
    section = README[README.index(f"\n{heading}\n") :]
    end = re.search(rf"^#{{2,{len(level)}}} ", section[len(heading) + 2 :], re.MULTILINE)
    section = section[: len(heading) + 2 + end.start()] if end else section
    return [text for kind, text in BLOCK.findall(section) if kind == language]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "my_rewards.py").write_text(blocks("## Write a reward", "python")[0])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_readme_write_a_reward_runs_as_written(folder: Path, model_folder: Path, capsys) -> None:
    (recipe,) = blocks("## Write a reward", "yaml")
    (folder / "recipe.yaml").write_text(recipe + REST.format(model=model_folder))
    (folder / "train.jsonl").write_text('{"question": "2+2?", "answer": "Two and two.\\n#### 4"}\n')
    main(["train", "recipe.yaml", "--dry-run"])
    shown = capsys.readouterr().out
    for value in ("reasoning_format 1.0", "math_answer 1.0", "my_rewards:brevity 1.0", "my_rewards:shouting 0.0"):
        assert value in shown


def test_readme_script_runs_as_written(folder: Path) -> None:
    (script,) = blocks("### Score in a script", "python")
    (folder / "script.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(PROJECT / ".package")}
    done = subprocess.run([sys.executable, "script.py"], env=environment, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == (
        "{'math_answer': [1.0], 'my_rewards:brevity': [1.0]} [1.5] [{}]\n",
        "",
    )


def test_readme_other_rewards_can_be_built(folder: Path) -> None:
    _, brevity, on_topic, starts, _ = blocks("## Write a reward", "python")
    text = f"from rekatrain.rewards import ParsedCompletion\n\n\n{brevity}\n\n{on_topic}\n\n{starts}"
    (folder / "my_rewards.py").write_text(text)
    (golden,) = blocks("## Check rewards before a run", "python")
    (folder / "my_golds.py").write_text(golden)
    functions = build_reward_functions(
        {
            "my_rewards:brevity": {"limit": 1},
            "my_rewards:on_topic": None,
            "my_rewards:Starts": {"pattern": "a"},
            "my_golds:names_color": None,
        }
    )
    assert [function.columns for function in functions] == [("language",), ("topic",), (), ("color",)]
    columns = {"language": ["en"], "topic": ["sea"], "color": ["blue"]}
    with Grader(functions) as grader:
        scores = grader.score(
            prompts=["human: ? <sep> assistant:"],
            completions=[" The sea is blue. It is vast. <sep>"],
            completion_ids=[[1]],
            columns=columns,
        )
    assert [of_one[0] for of_one in scores.by_name.values()] == [0.0, 0.5, 0.0, 1.0]
    assert scores.metrics == [{"my_rewards:on_topic": {"sentences": 2.0}}]
    assert scores.notes == [{"my_rewards:on_topic": {"off_topic": [" It is vast"]}}]
    assert functions[-1].gold is not None and functions[-1].gold("red") == "It is red."


def test_readme_model_rewards_can_be_built(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "x")
    for name in ("politeness", "rm-1", "rm-2", "rm-3"):
        (folder / "exports" / name).mkdir(parents=True)
    names = []
    for text in blocks("## Rewards by a model", "yaml"):
        rewards = YAML(typ="safe", pure=True).load(text)["rewards"]
        build_reward_functions(rewards)
        names += rewards
    assert names == ["reward_model", "reward_model", "remote_reward_model", "judge", "judge"]


def test_readme_names_every_reward_and_option() -> None:
    for name in REWARDS:
        assert f"`{name}`" in README
        for option in read_signature(name).options:
            assert re.search(rf"\b{option}\b", README), f"{name}.{option}"


def test_readme_links_to_its_own_sections() -> None:
    headings = re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    assert set(re.findall(r"\]\(#([^)]*)\)", README)) <= anchors
