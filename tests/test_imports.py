"""The shape of the code: imports point one way, and a file is one sitting."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What each package may import of the three.
MAY_IMPORT = {"data": {"data"}, "rewards": {"data", "rewards"}, "trainer": {"data", "rewards", "trainer"}}
FILES = [path for package in MAY_IMPORT for path in sorted((ROOT / package).rglob("*.py"))]


def imported_packages(source: str) -> set[str]:
    """Top-level names of everything that the source imports, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            names.add((node.module or "").split(".")[0])
    return names


def test_imports_are_found_wherever_they_stand():
    source = (
        "import a.b, c\nfrom d.e import f\ndef g():\n    if True:\n        from h import i\n        import j as k\n"
    )
    assert imported_packages(source) == {"a", "c", "d", "h", "j"}


def test_there_are_files_of_each_package():
    assert {path.relative_to(ROOT).parts[0] for path in FILES} == {"data", "rewards", "trainer"}
    assert len(FILES) >= 30


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    package = path.relative_to(ROOT).parts[0]
    ours = imported_packages(path.read_text(encoding="utf-8")) & (MAY_IMPORT.keys() | {"tests", "recipes"})
    assert ours <= MAY_IMPORT[package]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_has_at_most_300_lines(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300
