"""All ranks of a launch must start from the same recipe, rows, model, checkpoint and versions: before weights load.

Otherwise a node with another copy of the data trains other steps, or waits in other collectives, until a time limit
ends the run without a reason.
"""

from dataclasses import asdict
from pathlib import Path

from rekatrain.trainer.processes.ranks import ranks
from rekatrain.trainer.recipe.load import Recipe, flatten
from rekatrain.trainer.resume.fingerprints import Fingerprints
from rekatrain.trainer.run.checkpoints import read_manifest

# Digits of a hash that a message shows.
SHOWN_DIGITS = 12


def agree_on_recipe(recipe: Recipe, *, resume: bool) -> None:
    """Raise InputError on a rank whose recipe or `--resume` is not that of rank 0; nothing has to be connected yet."""
    here = ranks()
    if here is not None:
        facts = {f"the recipe's {key}": repr(value) for key, value in flatten(asdict(recipe)).items()}
        here.agree("recipe", {**facts, "--resume": "given" if resume else "not given"})


def agree_on_start(prints: Fingerprints, checkpoint: Path | None) -> None:
    """Raise InputError on a rank that reads other rows, model, rewards, versions or checkpoint than rank 0.

    prints:     of this rank
    checkpoint: the one that rank 0 has chosen
    """
    here = ranks()
    if here is None:
        return
    facts = {
        "rows": f"{prints.num_rows:,} of hash {prints.rows[:SHOWN_DIGITS]}",
        "the model's config.json": prints.architecture[:SHOWN_DIGITS],
        "the base weights": prints.base_weights[:SHOWN_DIGITS],
        **{f"the code of reward {name}": digest[:SHOWN_DIGITS] for name, digest in prints.rewards.items()},
        **{f"the file of reward {name}": digest[:SHOWN_DIGITS] for name, digest in prints.files.items()},
        **{name: value for name, value in prints.environment.items() if name != "device"},  # nodes may have other cards
    }
    if checkpoint is not None:
        facts[checkpoint.name] = _describe(checkpoint)
    here.agree("start", facts)


def _describe(checkpoint: Path) -> str:
    """Return what this host sees of a checkpoint."""
    try:
        files = read_manifest(checkpoint)["files"]
    except ValueError:
        return f"not there, in {str(checkpoint.parent)!r}"
    return f"{len(files)} files of {sum(entry['size'] for entry in files.values()):,} bytes"
