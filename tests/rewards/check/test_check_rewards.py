"""check-rewards: golds earn full marks, wrong answers are made and counted, and a broken reward shows in the report."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rekatrain.rewards.check.mutations import wrong_answers
from rekatrain.trainer.api import check_rewards
from rekatrain.trainer.cli import main

PROJECT = Path(__file__).parents[3]
MY_REWARDS = """
import os, sys, time

from rekatrain.rewards import InputError, has_gold


@has_gold(lambda color: color)
def lenient(completion, *, color):
    return float(color in completion.answer)


@has_gold(lambda color: color.upper())
def strict(completion, *, color):
    return float(completion.answer == color)


@has_gold(lambda color: color)
def failing(completion, *, color):
    if color == "blue":
        raise InputError("blue cannot be graded")
    if color == "green":
        time.sleep(60)
    return None if color == "red" else 0.5
"""
COLORS = ["red", "green", "blue", "cyan"]


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Return a function that writes rows and a recipe with rewards, and returns the recipe's path."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(MY_REWARDS)

    def write(rewards, rows, **options):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        dataset = {"path": "rows.jsonl", "format": "prompt_answer", "source": "ours", **options}
        tree = {"stage": "rloo", "output_dir": "run", "model": {"pretrained_model_name_or_path": "none"}}
        tree |= {"dataset": dataset, "rloo": {"max_steps": 1}, "rewards": rewards, "scoring": {"timeout": 1.0}}
        (tmp_path / "recipe.yaml").write_text(json.dumps(tree))
        return tmp_path / "recipe.yaml"

    return write


def colored(*colors):
    return [{"prompt": f"Name {number}.", "answer": color, "color": color} for number, color in enumerate(colors)]


def test_check_rewards_counts_each_result_of_golds_by_source(recipe):
    check = check_rewards(recipe({"my_rewards:failing": {"weight": 1}}, colored(*COLORS)))
    (table,) = check.golds
    assert (table.source, table.num_rows, table.counts()) == ("ours", 4, (0, 0, 1, 1, 2))
    assert table.mean == 0.5
    assert check.slowest[0][0] == 1.0 and "rows.jsonl:2" in check.slowest[0][1]
    assert any("blue cannot be graded" in example for example in table.examples)


def test_check_rewards_shows_a_lenient_reward(recipe, capsys):
    check = check_rewards(recipe({"my_rewards:lenient": None}, colored("dark red", "light green", "blue")))
    assert [table.counts() for table in check.golds] == [(3, 0, 0, 0, 0)]
    passed = {table.mutation: (table.num_made, table.num_passed) for table in check.wrong}
    assert passed["two answers"] == (3, 3) and passed["another row's gold"] == (3, 0) and passed["empty"] == (3, 0)
    assert "'dark red or maybe light green' for 'dark red'" in capsys.readouterr().out


def test_check_rewards_passes_right_golds_with_status_0(recipe, capsys):
    rows = [{"prompt": f"{n}+{n}?", "answer": str(2 * n), "color": "red"} for n in range(1, 30)]
    with pytest.raises(SystemExit) as ended:
        main(["check-rewards", str(recipe({"math_answer": None, "exact_match": {"weight": 0}}, rows))])
    out = capsys.readouterr().out
    assert ended.value.code == 0 and out.count("100.0%") == 2 and "hint" not in out
    wrong = [line for line in out.splitlines() if "math_answer  " in line and "changed" in line]
    assert len(wrong) == 2 and all(line.split()[-2:] == ["29", "0"] for line in wrong)


@pytest.mark.parametrize(
    ("rewards", "rows", "hint"),
    [
        ({"my_rewards:strict": None}, colored(*COLORS), "no gold earns more than 0 (rows.jsonl:1: 'RED' gives 0.0)"),
        ({"math_answer": None}, colored("red hot", "green sea"), "every row is None"),
        ({"my_rewards:failing": None}, colored("blue", "blue"), "the reward fails on every row"),
    ],
)
def test_check_rewards_hints_at_a_reward_without_golds(recipe, capsys, rewards, rows, hint):
    with pytest.raises(SystemExit) as ended:
        main(["check-rewards", str(recipe(rewards, rows)), "seed=1"])
    assert ended.value.code == 1 and hint in capsys.readouterr().out


def test_check_rewards_samples_rows_and_names_the_unchecked(recipe, capsys):
    rewards = {"math_answer": None, "reasoning_format": {"weight": 0.1}, "my_batch:score": {"weight": 0}}
    path = recipe(rewards, [{"prompt": f"{n}?", "answer": str(n)} for n in range(100)])
    path.with_name("my_batch.py").write_text("def score(completions, **kwargs):\n    return [0.0] * len(completions)\n")
    check = check_rewards(path, num_rows=10, num_wrong=1)
    assert check.golds[0].num_rows == 10 and {table.num_made for table in check.wrong} == {1}
    assert "a batch function has no gold" in check.without_gold["my_batch:score"]
    assert "10 rows" in capsys.readouterr().out


def test_check_rewards_counts_rows_without_a_gold(recipe, capsys):
    rows = [{"prompt": f"{n}?", "answer": None if n < 3 else str(n), "color": "red"} for n in range(10)]
    check = check_rewards(recipe({"math_answer": None, "my_rewards:lenient": None}, rows))
    assert check.without_gold == {"math_answer of ours": "3 of 10 rows have no gold"}
    assert "math_answer of ours: 3 of 10 rows have no gold" in capsys.readouterr().out


def test_check_rewards_is_one_line_for_a_wrong_recipe(recipe, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["check-rewards", str(recipe({}, colored("red")))])
    assert ended.value.code == 2 and capsys.readouterr().err.count("\n") == 1


CODE = "```python\ndef add(a, b):\n    total = a + b\n    return total\n```"


@pytest.mark.parametrize(
    ("gold", "other", "mutation", "expected"),
    [
        ("\\boxed{42}", "\\boxed{7}", "digit changed", "\\boxed{43}"),
        ("\\boxed{-3.5}", None, "sign changed", "\\boxed{3.5}"),
        ("\\boxed{(2, 3)}", None, "reordered", "\\boxed{(3, 2)}"),
        ("120", "7", "reordered", "021"),
        ("120", "7", "truncated", "1"),
        ("120", "7", "two answers", "120 or maybe 7"),
        ("120", "7", "another row's gold", "7"),
        ("North Sea", None, "reordered", "Sea North"),
        (CODE, None, "sign changed", CODE.replace("a + b", "a - b")),
        (CODE, None, "reordered", "```python\ndef add(a, b):\n    return total\n    total = a + b\n```"),
        (CODE, None, "empty", ""),
    ],
)
def test_wrong_answers_of_each_mutation(gold, other, mutation, expected):
    assert wrong_answers(gold, other)[mutation] == expected


@pytest.mark.parametrize("gold", ["0", "7", "B", CODE, "\\boxed{x}", "a"])
def test_wrong_answers_never_contain_the_gold_itself(gold):
    assert gold not in wrong_answers(gold, gold).values()


def test_dry_run_checks_a_sample_of_the_golds(recipe, model_folder, capsys):
    rows = [{"prompt": f"{n}+{n}?", "answer": "none" if n == 99 else str(2 * n), "color": "red"} for n in range(100)]
    path = recipe({"math_answer": None, "my_rewards:failing": {"weight": 0}}, rows)
    model = f"model={{pretrained_model_name_or_path: {model_folder}, dtype: float32}}"
    sizes = "rloo={max_steps: 1, num_generations: 2, max_completion_length: 4}"
    main(["train", str(path), "--dry-run", model, sizes])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("# golds of")]
    assert line.startswith("# golds of 64 of 100 rows: math_answer of ours 64 of 64 are 1;")
    assert "my_rewards:failing of ours 0 of 64 are 1 (64 None)" in line


@pytest.mark.slow
def test_check_rewards_ends_with_one_line_at_ctrl_c(recipe):
    path = recipe({"my_rewards:failing": {"timeout": 30}}, colored(*["green"] * 50))
    process = subprocess.Popen(
        [sys.executable, "-m", "rekatrain", "check-rewards", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(PROJECT / ".package")},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    workers: list[psutil.Process] = []
    deadline = time.monotonic() + 60
    while not workers and time.monotonic() < deadline:
        children = psutil.Process(process.pid).children(recursive=True)
        workers = [child for child in children if len(child.children()) == 0 and len(children) > 2]
        time.sleep(0.2)
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err.strip().splitlines()[-1]) == (130, "rekatrain: interrupted"), err
    assert "Traceback" not in err
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
