"""The first and the last step of every export: a folder beside OUT, and its card, serving/ and name at the end."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rekatrain.trainer.export.card import write_card
from rekatrain.trainer.export.serving import write_serving
from rekatrain.trainer.models.source import Source
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.run.checkpoints import PARTIAL_SUFFIX, write_failures

logger = logging.getLogger(__name__)


@contextmanager
def written_aside(out: Path) -> Iterator[Path]:
    """Give the folder in which an export to `out` is written; delete it at the end, unless `publish` renamed it.

    Its name is one that nobody else uses: a folder OUT.partial is the user's.
    """
    partial = out.with_name(f".{out.name}{PARTIAL_SUFFIX}")
    shutil.rmtree(partial, ignore_errors=True)  # of an export that was killed
    try:
        with write_failures(out.absolute().parent):
            yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def final_name(partial: Path) -> str:
    """Return the name that the folder of `written_aside` will have."""
    return partial.name.removeprefix(".").removesuffix(PARTIAL_SUFFIX)


def publish(
    partial: Path, out: Path, form: str, recipe: Recipe, run: Path, source: Source, *, evaluation: str | None = None
) -> None:
    """Write the model card and serving/ into `partial`, make its files readable by all, and rename it to `out`.

    form:       merged, adapter, gguf or reward
    run:        the run folder
    evaluation: a measurement of the exported weights, for the card
    """
    write_card(partial, form, recipe, run, source, name=out.name, evaluation=evaluation)
    write_serving(partial, form, source, out=out)
    for path in partial.rglob("*"):
        if path.is_file():
            path.chmod(0o644)  # safetensors writes 0600, which a server under another user cannot read
    partial.rename(out)
    logger.info("exported %s to %s (%s)", source.folder, out, form)
