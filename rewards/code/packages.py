"""Find the installed packages that generated code may use."""

import ast
import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from rekatrain.rewards.errors import RewardError

# Packages that generated code and its tests may use where they are installed.
PACKAGES = ("numpy", "scipy", "pandas", "sympy", "networkx", "mpmath", "sortedcontainers", "pytest")
IMPORT = re.compile(rf"^[ \t]*(?:import|from)[ \t]+(?:[\w, ]*\b)?(?:{'|'.join(PACKAGES)})\b", re.MULTILINE)


def find_packages(sources: Sequence[str]) -> list[str]:
    """Return the folders of installed packages if code imports one of PACKAGES, else none."""
    if not any(IMPORT.search(source) for source in sources):
        return []
    return package_folders()


def check_installed(code: str) -> None:
    """Raise RewardError if code imports one of PACKAGES at its top level that is not installed: it may be right."""
    if not IMPORT.search(code):
        return
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in tree.body:
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [str(node.module)]
        for name in (name.partition(".")[0] for name in names):
            if name in PACKAGES and importlib.util.find_spec(name) is None:
                raise RewardError(f"the code imports {name}, which is not installed: install {name}")


@cache
def package_folders() -> list[str]:
    """Return the folders of installed packages, without symbolic links."""
    folders = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    return list(dict.fromkeys(os.path.realpath(folder) for folder in folders if os.path.isdir(folder)))
