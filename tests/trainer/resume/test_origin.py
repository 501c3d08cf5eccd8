"""The origin of a checkpoint: changes that no key of the recipe shows."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from rekatrain.data.errors import InputError
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.resume.fingerprints import take_fingerprints
from rekatrain.trainer.resume.origin import check_origin
from rekatrain.trainer.run.folder import ORIGIN_FILE

ROWS = [[[1, 2, 3], [2, 3]], [[4], [4]]]
SCHEMA = {"type": "object"}


@pytest.fixture
def recipe(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    return Recipe(
        stage="rloo",
        output_dir="run",
        model={"pretrained_model_name_or_path": "model", "dtype": "float32"},
        dataset={"path": "rows.jsonl"},
        lora={"r": 4},
        rloo={"max_steps": 9},
        rewards={"json_schema": {"schema": "schema.json"}},
    )


@pytest.fixture
def checkpoint(recipe: Recipe, tmp_path: Path) -> Path:
    """A folder with the origin of the recipe's run after three steps."""
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    write(folder, check_origin(recipe, take_fingerprints(recipe, ROWS), None))
    return folder


def write(checkpoint: Path, origin: dict[str, Any]) -> None:
    (checkpoint / ORIGIN_FILE).write_text(json.dumps(origin))


def change_tensor(folder: Path, name: str) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[-1] += 1
    save_file(tensors, file, {"format": "pt"})


def test_the_same_run_is_no_change(recipe: Recipe, checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert check_origin(recipe, take_fingerprints(recipe, ROWS), checkpoint) == json.loads(
        (checkpoint / ORIGIN_FILE).read_text()
    )
    (Path("model") / "config.json").write_text(
        json.dumps({**json.loads((Path("model") / "config.json").read_text()), "transformers_version": "6.0.0"})
    )
    check_origin(recipe, take_fingerprints(recipe, iter(ROWS)), checkpoint)
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("sections", "part"),
    [
        ({}, "adapter"),
        ({"lora": None}, "KL"),
        ({"lora": None, "rloo": {"max_steps": 9, "beta": 0.0}}, None),
        ({"lora": None, "stage": "sft", "rloo": {}, "rewards": {}}, None),
    ],
    ids=["adapter", "reference", "no reference", "SFT of all weights"],
)
def test_other_base_weights_matter_below_an_adapter_or_a_kl(
    sections: dict[str, Any],
    part: str | None,
    recipe: Recipe,
    checkpoint: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    recipe = replace(recipe, **sections)
    write(checkpoint, check_origin(recipe, take_fingerprints(recipe, ROWS), None))
    change_tensor(Path("model"), "model.norm.weight")
    if part is None:
        check_origin(recipe, take_fingerprints(recipe, ROWS), checkpoint)
        assert caplog.messages == ["changed since the checkpoint: the weights of model; the run continues with its own"]
    else:
        with pytest.raises(InputError, match=f"'model' has other weights than those of the checkpoint's {part}"):
            check_origin(recipe, take_fingerprints(recipe, ROWS), checkpoint)


def test_fingerprint_notices_a_change_of_any_tensor(recipe: Recipe) -> None:
    tensors = load_file("model/model.safetensors")
    seen = {take_fingerprints(recipe, ROWS).base_weights}
    for name in tensors:
        change_tensor(Path("model"), name)
        seen.add(take_fingerprints(recipe, ROWS).base_weights)
    assert len(seen) == 1 + len(tensors) > 20


def test_fingerprint_of_the_hub_is_the_commit(recipe: Recipe, tmp_path: Path) -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    snapshot = tmp_path / "models--a--b" / "snapshots" / commit
    shutil.copytree("model", snapshot)
    model = {"pretrained_model_name_or_path": str(snapshot)}
    prints = take_fingerprints(replace(recipe, model=model), ROWS)
    assert prints.base_weights == f"commit {commit}"
    assert prints.architecture == take_fingerprints(recipe, ROWS).architecture


def test_file_of_a_reward_may_move_but_not_change(recipe: Recipe, checkpoint: Path) -> None:
    Path("schema.json").rename("moved.json")
    moved = replace(recipe, rewards={"json_schema": {"schema": "moved.json"}})
    check_origin(moved, take_fingerprints(moved, ROWS), checkpoint)
    Path("moved.json").write_text(json.dumps({"type": "array"}))
    with pytest.raises(InputError) as error:
        check_origin(moved, take_fingerprints(moved, ROWS), checkpoint)
    assert str(error.value).startswith(
        "--resume: other content in rewards.json_schema.schema; rewards.json_schema.schema was 'schema.json' and is "
        "'moved.json'. Set it back"
    )


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        (
            lambda prints: prints["environment"].update(torch="1.0", launch="ddp in 2 processes"),
            r"torch was 1\.0 and is \S+; launch was ddp in 2 processes and is single in 1 process \(last bits of the",
        ),
        (lambda prints: prints["rewards"].update(json_schema="0"), "the code of the rewards json_schema; scores may"),
    ],
)
def test_versions_and_code_of_rewards_are_one_warning(
    change: Callable[[dict[str, Any]], None],
    warning: str,
    recipe: Recipe,
    checkpoint: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    origin = json.loads((checkpoint / ORIGIN_FILE).read_text())
    change(origin["fingerprints"])
    write(checkpoint, origin)
    check_origin(recipe, take_fingerprints(recipe, ROWS), checkpoint)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert re.match(f"changed since the checkpoint: {warning}", record.getMessage())


def test_code_that_a_reward_imports_belongs_to_it(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def fingerprint() -> str:
        return take_fingerprints(replace(recipe, rewards={"ours.rewards:brevity": None}), ROWS).rewards[
            "ours.rewards:brevity"
        ]

    monkeypatch.syspath_prepend(".")
    files = {
        "ours/__init__.py": "",
        "ours/rewards.py": "import torch\nfrom . import limits\ndef brevity(completion):\n    return limits.LIMIT\n",
        "ours/limits.py": "from other import LIMIT\n",
        "other.py": "LIMIT = 1.0\n",
        "unused.py": "LIMIT = 1.0\n",
    }
    for name, content in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(content)
    seen = {"before": fingerprint()}
    for name in files:
        Path(name).write_text(f"{files[name]}\n# changed\n")
        seen[name] = fingerprint()
    assert seen.pop("unused.py") == seen["other.py"]
    assert len({*seen.values()}) == len(files)


def test_checkpoint_without_an_origin_is_rejected(recipe: Recipe, checkpoint: Path) -> None:
    (checkpoint / ORIGIN_FILE).unlink()
    with pytest.raises(InputError, match="has no origin.json: a version before 0.2.0 saved it"):
        check_origin(recipe, take_fingerprints(recipe, ROWS), checkpoint)
