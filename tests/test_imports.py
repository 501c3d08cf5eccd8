"""The shape of the code: imports point one way, and a file is short enough to read in one go."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What each package may import of the three.
MAY_IMPORT = {"data": {"data"}, "rewards": {"data", "rewards"}, "trainer": {"data", "rewards", "trainer"}}
FILES = [path for package in MAY_IMPORT for path in sorted((ROOT / package).rglob("*.py"))]


def imported_packages(source: str) -> set[str]:
    """Return the packages that a source imports anywhere: `data` for rekatrain.data, `(bare) data` for data."""
    modules: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are absolute here"
            # `from rekatrain import data` imports a package, `from rekatrain.data import chat` too.
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    parts = [module.split(".") for module in modules]
    ours = {names[1] for names in parts if names[0] == "rekatrain" and len(names) > 1}
    return ours | {f"(bare) {names[0]}" for names in parts if names[0] in {*MAY_IMPORT, "tests", "recipes"}}


def test_imported_packages_finds_imports_anywhere():
    source = (
        "import rekatrain.a.b, c\nfrom rekatrain.d.e import f\nfrom rekatrain import g, RECIPES\n"
        "def h():\n    if True:\n        from data.i import j\n        import rewards as k\n"
    )
    assert imported_packages(source) == {"a", "d", "g", "RECIPES", "(bare) data", "(bare) rewards"}


def test_files_exist_of_each_package():
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == {"data", "rewards", "trainer"}
    assert len(FILES) >= 30


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    packages = imported_packages(path.read_text(encoding="utf-8"))
    assert {name for name in packages if name.startswith("(bare)")} == set()
    assert packages & MAY_IMPORT.keys() <= MAY_IMPORT[package]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_file_has_at_most_300_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300
