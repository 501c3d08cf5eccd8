"""A wheel, installed outside the checkout, has everything that a run, a plan and an export read."""

import shutil
import sys
import zipfile
from pathlib import Path

import pytest

from tests.package.processes import ROOT, finish, run, write_recipes

pytestmark = [pytest.mark.slow, pytest.mark.launched]

SOURCES = (
    "rekatrain.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    ".package",
    "data",
    "rewards",
    "trainer",
    "recipes",
)
BUILD_SDIST = "import setuptools.build_meta as backend; backend.build_sdist({!r})"


def build_wheel(source: Path, out: Path) -> Path:
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", out]
    finish(source, sys.executable, "-m", "pip", "wheel", ".", *options)
    (wheel,) = out.glob("rekatrain-*.whl")
    return wheel


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout: a build writes beside its sources."""
    folder = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def package(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel is installed in; its dependencies are those of this environment."""
    folder = tmp_path_factory.mktemp("site")
    options = ["--no-deps", "--quiet", "--target", folder]
    finish(folder, sys.executable, "-m", "pip", "install", *options, wheel)
    return folder


def test_wheel_has_every_file_of_the_packages(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("data", "rewards", "trainer", "recipes"):
        for path in (ROOT / folder).rglob("*"):
            if path.is_file() and "__pycache__" not in path.parts and path.name != "README.md":
                assert f"rekatrain/{path.relative_to(ROOT)}" in names
    assert "rekatrain/py.typed" in names
    assert not any("__pycache__" in name or name.startswith("tests") for name in names)


def test_sdist_builds_the_same_wheel(source: Path, wheel: Path, tmp_path: Path) -> None:
    finish(source, sys.executable, "-c", BUILD_SDIST.format(str(tmp_path)))
    (sdist,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(sdist, tmp_path)
    again = build_wheel(tmp_path / sdist.name.removesuffix(".tar.gz"), tmp_path / "wheel")
    files = {info.filename: info.CRC for info in zipfile.ZipFile(wheel).infolist()}
    built = {info.filename: info.CRC for info in zipfile.ZipFile(again).infolist()}
    assert [name for name in files if name.startswith("rekatrain/") and built.get(name) != files[name]] == []


def test_wheel_writes_its_recipes_and_plans_them(package: Path, tmp_path: Path) -> None:
    script = package / "bin" / "rekatrain"
    shown = finish(tmp_path, script, "recipes", "mine", package=package)
    assert "mine/reka-flash-3" in shown and "rekatrain train mine/reka-flash-3/sft-lora.yaml --dry-run" in shown
    assert (tmp_path / "mine" / "accelerate" / "zero3.yaml").exists()
    assert not list((tmp_path / "mine").glob("*.sh"))
    recipe = tmp_path / "mine" / "reka-flash-3" / "sft-lora.yaml"
    assert "--launch mine/accelerate/ddp.yaml" in recipe.read_text()
    assert "rekatrain launch mine/reka-flash-3/sft-lora.yaml" in recipe.read_text()
    again = run(tmp_path, script, "recipes", "mine", package=package)
    assert (again.returncode, again.stderr) == (2, "rekatrain: error: 'mine' exists already; choose a new folder\n")
    # The plan reads the model's configuration from the package.
    launch = ["--launch", "mine/accelerate/ddp.yaml"]
    assert "GB" in finish(tmp_path, script, "plan", recipe, *launch, package=package)


def test_wheel_trains_and_exports(package: Path, tmp_path: Path, model_folder: Path) -> None:
    write_recipes(tmp_path, model_folder)
    python = [sys.executable, "-m", "rekatrain"]
    finish(tmp_path, *python, "train", "rloo.yaml", package=package)
    finish(tmp_path, *python, "export", "rloo", "out", package=package)
    assert (tmp_path / "out" / "README.md").exists() and (tmp_path / "out" / "chat_template.jinja").exists()
    where = "import rekatrain, rekatrain.trainer.cli as cli; print(rekatrain.__file__, cli.__file__)"
    for path in finish(tmp_path, sys.executable, "-c", where, package=package).split():
        assert Path(path).is_relative_to(package)
