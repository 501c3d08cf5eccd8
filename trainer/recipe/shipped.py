"""The recipes and launch files of the package: the folder recipes/ of a checkout, or package data of a wheel."""

import re
import shutil
from pathlib import Path

from rekatrain import RECIPES
from rekatrain.data.errors import InputError
from rekatrain.trainer.run.places import check_parent

# They belong to a checkout, whose environment they set up.
CHECKOUT_ONLY = ("environment.sh", "quickstart.sh", "multi-task.sh", "__pycache__")


def shipped_file(name: str) -> str:
    """Return the path of a shipped file such as `accelerate/zero3.yaml`; relative if it is below the current folder."""
    path = RECIPES / name
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def write_recipes(out: Path) -> None:
    """Copy the shipped recipes and launch files to the new folder `out`, with its name in their commands."""
    if out.exists() or out.is_symlink():
        raise InputError(f"{str(out)!r} exists already; choose a new folder")
    check_parent(out, "OUT")
    shutil.copytree(RECIPES, out, ignore=shutil.ignore_patterns(*CHECKOUT_ONLY))
    files = [path for path in out.rglob("*") if path.is_file()]

    def rename(named: re.Match[str]) -> str:
        return str(out / named[1]) if (out / named[1]).exists() else named[0]

    for path in files:
        path.chmod(0o644)  # an installation may be read-only
        text = path.read_text(encoding="utf-8")
        path.write_text(re.sub(r"(?<![\w/.])recipes/([\w./-]*\w)", rename, text), encoding="utf-8")
    print(
        f"wrote {len(files)} files: recipes for Reka Flash 3 in {out / 'reka-flash-3'} and for a small model in "
        f"{out / 'smollm2'}, launch files for several GPUs in {out / 'accelerate'}\n"
        "next: choose a recipe, set its model.pretrained_model_name_or_path and dataset, and check it with\n"
        f"  rekatrain train {out / 'reka-flash-3' / 'sft-lora.yaml'} --dry-run"
    )
