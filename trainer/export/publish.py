"""The last step of every export: add the model card and serving/ to verified weights, and rename the folder."""

import logging
from pathlib import Path

from rekatrain.trainer.export.card import write_card
from rekatrain.trainer.export.serving import write_serving
from rekatrain.trainer.model_source import Source
from rekatrain.trainer.recipe.load import Recipe

logger = logging.getLogger(__name__)


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
