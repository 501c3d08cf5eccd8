"""The inputs of a report: run folders, running ones too, and files of `rekatrain evaluate`."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rekatrain.data.errors import InputError
from rekatrain.trainer.recipe.load import flatten
from rekatrain.trainer.recipe.yaml_text import parse_yaml
from rekatrain.trainer.run.folder import METRICS_FILE, RECIPE_FILE, ROLLOUTS_FILE
from rekatrain.trainer.run.records import read_records

MAX_INPUTS = 12


@dataclass(frozen=True, kw_only=True)
class ReportInput:
    """A run or an evaluation.

    name:       short name, different for each input of a report
    path:       the run folder or the file
    stage:      sft, reward, rloo or evaluate
    recipe:     dotted key -> value of the resolved recipe
    metrics:    records of metrics.jsonl, by step
    rollouts:   the file of completions, if there is one
    evaluation: the content of the file of an evaluation
    """

    name: str
    path: Path
    stage: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, Any]] = ()
    rollouts: Path | None = None
    evaluation: Mapping[str, Any] | None = None


def read_inputs(paths: Sequence[Path]) -> list[ReportInput]:
    """Read run folders and evaluation files; raise InputError for anything else."""
    if len(paths) > MAX_INPUTS:
        raise InputError(f"{len(paths)} runs are too many for one page: give at most {MAX_INPUTS}")
    names = _short_names(paths)
    return [_read_input(path, name) for path, name in zip(paths, names, strict=True)]


def _read_input(path: Path, name: str) -> ReportInput:
    if path.is_dir():
        return _read_run(path, name)
    if not path.exists():
        raise InputError(f"{str(path)!r} does not exist: give a run folder, or a file of rekatrain evaluate --out")
    return _read_evaluation(path, name)


def _read_run(path: Path, name: str) -> ReportInput:
    file = path / RECIPE_FILE
    if not file.is_file():
        raise InputError(f"{str(path)!r} is no run folder: it has no {RECIPE_FILE}")
    recipe = parse_yaml(file.read_text(encoding="utf-8"), str(file))
    if not isinstance(recipe, dict) or not isinstance(recipe.get("stage"), str):
        raise InputError(f"{str(file)!r} is no resolved recipe: it names no stage")
    rollouts = path / ROLLOUTS_FILE
    return ReportInput(
        name=name,
        path=path,
        stage=recipe["stage"],
        recipe=flatten_lists(recipe),
        metrics=sorted(read_records(path / METRICS_FILE), key=lambda record: record["step"]),
        rollouts=rollouts if rollouts.is_file() else None,
    )


def _read_evaluation(path: Path, name: str) -> ReportInput:
    try:
        evaluation = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{str(path)!r} cannot be read as JSON: {error}") from error
    if not isinstance(evaluation, dict) or not isinstance(evaluation.get("answers"), list):
        raise InputError(f"{str(path)!r} is no file of rekatrain evaluate --out: it has no answers")
    sections = {name: evaluation[name] for name in ("model", "evaluate", "seed") if evaluation.get(name)}
    return ReportInput(name=name, path=path, stage="evaluate", recipe=flatten_lists(sections), evaluation=evaluation)


def flatten_lists(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a tree by dotted keys; items of a list of mappings by their index."""
    flat: dict[str, Any] = {}
    for key, value in flatten(tree).items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            flat |= flatten_lists({f"{key}.{index}": item for index, item in enumerate(value)})
        else:
            flat[key] = value
    return flat


def _short_names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest last parts of the paths that differ; a path that comes twice gets a number.

    >>> _short_names([Path("runs/a/rloo"), Path("runs/b/rloo")])
    ['a/rloo', 'b/rloo']
    """
    parts = [path.absolute().parts for path in paths]
    distinct = len(set(parts))
    longest = max(map(len, parts))
    length = next((n for n in range(1, longest) if len({part[-n:] for part in parts}) == distinct), longest)
    names = ["/".join(part[-length:]) for part in parts]
    return [name if names.count(name) == 1 else f"{name} ({index + 1})" for index, name in enumerate(names)]
