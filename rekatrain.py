"""rekatrain: supervised fine-tuning and RLOO for Reka Flash 3 and other Llama-compatible chat models.

    rekatrain COMMAND ...   or   python -m rekatrain COMMAND ...

Its packages are `rekatrain.data`, `rekatrain.rewards` and `rekatrain.trainer`, in a checkout the folders beside this
file. They have no other name, so a `data.py` or `rewards.py` of yours cannot shadow them.
"""

from pathlib import Path

__version__ = "0.1.0"
# The folder of the packages, in a checkout and in an installed wheel alike (.package/rekatrain is a link to here).
__path__ = [str(Path(__file__).resolve().parent)]
RECIPES = Path(__path__[0]) / "recipes"

if __name__ == "__main__":
    from rekatrain.trainer.cli import main

    main()
