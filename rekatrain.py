"""rekatrain: supervised fine-tuning and RLOO for Reka Flash 3 and other Llama-compatible chat models.

    rekatrain COMMAND ...   or   python -m rekatrain COMMAND ...

    from rekatrain import train, evaluate, export, sample, load_recipe, InputError

The packages are `rekatrain.data`, `rekatrain.rewards` and `rekatrain.trainer`; in a checkout they are the folders
beside this file. They have no other name, so a `data.py` or `rewards.py` of yours cannot shadow them.
"""

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rekatrain.data.errors import InputError as InputError
    from rekatrain.trainer.api import compare as compare
    from rekatrain.trainer.api import evaluate as evaluate
    from rekatrain.trainer.api import export as export
    from rekatrain.trainer.api import report as report
    from rekatrain.trainer.api import sample as sample
    from rekatrain.trainer.api import train as train
    from rekatrain.trainer.recipe.load import load_recipe as load_recipe

__version__ = "0.2.0"
__all__ = ["InputError", "compare", "evaluate", "export", "load_recipe", "report", "sample", "train"]

# In a checkout this file is reached through the link .package/rekatrain/__init__.py: the packages are beside the file
# itself, and `__main__`, which `python -m rekatrain` runs, is beside the link. In a wheel the two folders are one.
__path__ = list(dict.fromkeys([str(Path(__file__).resolve().parent), str(Path(__file__).absolute().parent)]))
RECIPES = Path(__path__[0]) / "recipes"

# Imported when they are used: `import rekatrain` imports no torch.
_MODULES = {
    "InputError": "rekatrain.data.errors",
    "compare": "rekatrain.trainer.api",
    "evaluate": "rekatrain.trainer.api",
    "export": "rekatrain.trainer.api",
    "load_recipe": "rekatrain.trainer.recipe.load",
    "report": "rekatrain.trainer.api",
    "sample": "rekatrain.trainer.api",
    "train": "rekatrain.trainer.api",
}


def __getattr__(name: str) -> Any:  # Any: a function or a class
    if name not in _MODULES:
        raise AttributeError(f"module 'rekatrain' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


if __name__ == "__main__":
    # `python -m` puts the current folder first on sys.path. At the end, no file of the user's shadows an installed
    # package (a `datasets.py` or `evaluate.py`), and reward modules are still found.
    if not sys.flags.safe_path:
        sys.path.append(sys.path.pop(0))

    from rekatrain.trainer.cli import main

    main()
