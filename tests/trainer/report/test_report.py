"""The content of a report: charts, recipes, completions and their sample."""

import base64
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from rekatrain.data.errors import InputError
from rekatrain.trainer.cli import main
from rekatrain.trainer.report.inputs import read_inputs
from rekatrain.trainer.report.panels import MAX_POINTS, make_panels
from rekatrain.trainer.report.report import recipe_table
from rekatrain.trainer.report.rollouts import Rollouts, collect_rollouts
from tests.trainer.report.pages import RECIPE, completion, write_run


def unpack(chunk: str) -> Any:
    return json.loads(gzip.decompress(base64.b64decode(chunk)))


def texts_of(rollouts: Rollouts) -> list[str]:
    """Return the texts of all completions in the order of the columns."""
    groups = [group for chunk in rollouts.chunks for group in unpack(chunk)]
    chunks = [unpack(chunk) for chunk in rollouts.chunks]
    places = zip(rollouts.groups["chunk"], rollouts.groups["slot"], strict=True)
    assert [chunks[chunk][slot] for chunk, slot in places] == groups
    return [text for group in groups for text in group["texts"]]


def panels_of(*metrics: list[dict[str, Any]], tmp_path: Path) -> dict[str, list[dict[str, Any]]]:
    runs = [write_run(tmp_path / f"run{number}", metrics=records) for number, records in enumerate(metrics)]
    return {panel["title"]: panel["lines"] for panel in make_panels(read_inputs(runs))}


def test_panels_draw_each_number_once(tmp_path: Path) -> None:
    names = ["reward", "reward/gsm8k", "rewards/math/mean", "loss", "kl", "entropy", "grad_norm", "mismatch_kl", "own"]
    names += ["completions/stop_ratio", "completions/clipped_ratio", "time/train", "tokens_per_second", "memory/host"]
    names += ["eval_loss", "eval_math_loss", "eval/accuracy", "eval/rewards/math/mean", "eval_mean_token_accuracy"]
    first = {"step": 1, "time": 1e9, **dict.fromkeys(names, 0.25), "reward_std": 0.1, "text": "no number", "none": None}
    panels = panels_of([first, {**first, "step": 2, "reward": None}], tmp_path=tmp_path)
    drawn = [line for lines in panels.values() for line in lines]
    assert len(drawn) == len(names) and all(line["values"][0] == 0.25 for line in drawn)
    assert panels["Reward"][0]["steps"] == [1] and panels["Entropy"][0]["steps"] == [1, 2]
    assert panels["Rewards by name"][0]["name"] == "math" and panels["own"][0]["name"] == "own"
    assert {line["name"] for line in panels["Finish reasons"]} == {"stop", "clipped"}


def test_panels_have_bands_hours_and_a_color_of_each_run(tmp_path: Path) -> None:
    evaluated = {"eval/accuracy": 0.5, "eval/accuracy_low": 0.4, "eval/accuracy_high": 0.6}
    records = [{"step": 0, "time": 7200.0, **evaluated}, {"step": 4, "time": 9000.0, **evaluated}]
    panels = panels_of(records, [{"step": 2, "reward": 1.0, "reward_std": 0.25}], tmp_path=tmp_path)
    (line,) = panels["Accuracy"]
    assert (line["low"], line["high"], line["hours"], line["run"]) == ([0.4, 0.4], [0.6, 0.6], [0.0, 0.5], 0)
    (line,) = panels["Reward"]
    assert (line["low"], line["high"], line["run"]) == ([0.75], [1.25], 1)


def test_panels_average_long_series_in_bins(tmp_path: Path) -> None:
    records = [{"step": step, "kl": float(step % 2)} for step in range(1, 2 * MAX_POINTS + 1)]
    (line,) = panels_of(records, tmp_path=tmp_path)["KL to the reference"]
    assert line["values"] == [0.5] * MAX_POINTS and line["steps"][:2] == [1.5, 3.5]


def test_recipe_table_marks_keys_that_differ(tmp_path: Path) -> None:
    other = {"rloo": {"max_steps": 4, "beta": 0.1}, "dataset": [{"path": "a"}, {"path": "b"}]}
    runs = read_inputs([write_run(tmp_path / "a"), write_run(tmp_path / "b", recipe=other)])
    rows = {row["key"]: row for row in recipe_table([run.recipe for run in runs])}
    assert [key for key, row in rows.items() if row["differs"]] == ["rloo.beta", "dataset.0.path", "dataset.1.path"]
    assert rows["rloo.beta"]["values"] == ["0.0", "0.1"] and rows["dataset.1.path"]["values"] == [None, "b"]
    assert [run.name for run in runs] == ["a", "b"] and not rows["seed"]["differs"]


def test_rollouts_keep_every_value_of_every_completion(tmp_path: Path) -> None:
    records = [
        completion(1, 1, "2", rewards={"math": 1.0}),
        completion(1, 1, "3", rewards={"math": 0.0, "format": 0.5}, reward=0.5, advantage=-0.5),
        completion(1, 2, "4", source="other", gold=["4", "four"]),
        completion(2, 1, "5", rewards={"math": None}, reward=None, reward_errors={"math": "broken"}),
    ]
    run = write_run(tmp_path / "run", rollouts=records)
    with (run / "rollouts.jsonl").open("a") as file:
        file.write('{"step": 2, "prompt_index": 1, "completion": "cut')  # the run is writing it
    rollouts = collect_rollouts(read_inputs([run]))
    assert texts_of(rollouts) == ["2", "3", "4", "5"] and rollouts.total == 4
    assert rollouts.completions["group"] == [0, 0, 1, 2] and rollouts.groups["step"] == [1, 1, 2]
    assert rollouts.groups["source"] == ["sums", "other", "sums"] and rollouts.groups["first"] == [0, 2, 3]
    assert rollouts.rewards == {"math": [1.0, 0.0, 1.0, None], "format": [None, 0.5, None, None]}
    assert rollouts.completions["reward"] == [1.0, 0.5, 1.0, None] and rollouts.completions["failed"] == [0, 0, 0, 1]
    assert rollouts.completions["advantage"] == [0.5, -0.5, 0.5, 0.5] and rollouts.completions["tokens"] == [1] * 4
    groups = unpack(rollouts.chunks[0])
    assert [group["gold"] for group in groups] == ["2", ["4", "four"], "2"]
    assert groups[2]["errors"] == [{"math": "broken"}]


@pytest.mark.parametrize("limit", [{"max_completions": 120}, {"max_text": 5000}])
def test_rollouts_sample_is_of_whole_groups_of_the_whole_run(tmp_path: Path, limit: dict[str, int]) -> None:
    records = [completion(step, prompt, "x" * 20) for step in range(1, 26) for prompt in range(4) for _ in range(3)]
    rollouts = collect_rollouts(read_inputs([write_run(tmp_path / "run", rollouts=records)]), **limit)
    assert rollouts.total == 300 and 80 <= len(texts_of(rollouts)) <= 120
    assert [rollouts.completions["group"].count(group) for group in {*rollouts.completions["group"]}] == [3] * len(
        rollouts.groups["run"]
    )
    steps = rollouts.groups["step"]
    assert steps == sorted(steps) and len({*steps}) >= 20 and max(map(steps.count, steps)) <= 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder / "nothing", "does not exist: give a run folder"),
        (lambda folder: folder, "is no run folder: it has no recipe.yaml"),
        (lambda folder: folder / "a.json", "has no answers"),
        (lambda folder: folder / "cut.json", "cannot be read as JSON"),
    ],
)
def test_report_rejects_what_is_no_run(tmp_path: Path, make: Any, message: str) -> None:
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "cut.json").write_text('{"answers": [')
    with pytest.raises(InputError, match=message):
        read_inputs([make(tmp_path)])


def test_report_command_writes_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", metrics=[{"step": 1, "reward": 0.5}], rollouts=[completion(1, 1, "2")])
    main(["report", str(run), "--out", str(tmp_path / "page.html")])
    assert "1 completions; open it" in capsys.readouterr().out
    page = (tmp_path / "page.html").read_text()
    assert page.startswith("<!doctype html>") and "src=" not in page.split('<script type="text/plain"')[0]
    with pytest.raises(SystemExit):
        main(["report", str(run), "--out", str(tmp_path)])
    assert RECIPE["stage"] == "rloo"
