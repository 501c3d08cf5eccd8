"""Find the installed packages that generated code may use."""

import os
import re
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

# Packages that generated code and its tests may use where they are installed.
PACKAGES = ("numpy", "scipy", "pandas", "sympy", "networkx", "mpmath", "sortedcontainers", "pytest")
IMPORT = re.compile(rf"^[ \t]*(?:import|from)[ \t]+(?:[\w, ]*\b)?(?:{'|'.join(PACKAGES)})\b", re.MULTILINE)


def find_packages(sources: Sequence[str]) -> list[str]:
    """Return the folders of installed packages if code imports one of PACKAGES, else none."""
    if not any(IMPORT.search(source) for source in sources):
        return []
    return package_folders()


@cache
def package_folders() -> list[str]:
    """Return the folders of installed packages, without symbolic links."""
    folders = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    return list(dict.fromkeys(os.path.realpath(folder) for folder in folders if os.path.isdir(folder)))
