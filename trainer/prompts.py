"""Tokenized prompts, and the prompts that each step samples."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from rekatrain.data.chat import encode_prompt, render_prompt
from rekatrain.data.errors import InputError
from rekatrain.data.mixture import Section, load_mixture
from rekatrain.data.rows import Row

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """The prompt of a row: its text, its token ids, and the row, which the rewards read."""

    text: str
    ids: list[int]
    row: Row


def load_prompts(
    section: Section | Sequence[Section],
    tokenizer: PreTrainedTokenizerBase,
    model_config: PretrainedConfig,
    max_completion_length: int,
    name: str = "dataset",
) -> list[Prompt]:
    """Read the prompts of a data set; each must leave room for a whole completion within the model's context.

    Raises InputError, with the row named, for a prompt that is too long, unless its source has `long_rows: skip`, or
    `bad_rows: skip`.
    """
    prompts = []
    too_long = []
    for row in load_mixture(section, name).rows:
        text = render_prompt(row.prompt)
        prompt = Prompt(text=text, ids=encode_prompt(text, tokenizer), row=row)
        if len(prompt.ids) + max_completion_length <= model_config.max_position_embeddings:
            prompts.append(prompt)
            continue
        message = (
            f"{row.where}: the prompt has {len(prompt.ids)} tokens; with max_completion_length "
            f"{max_completion_length} it exceeds the model's context of {model_config.max_position_embeddings}"
        )
        if row.source.long_rows != "skip":  # nothing of a prompt can be cut off
            raise InputError(f"{message}; shorten it, or set {name}.bad_rows to skip")
        too_long.append(message)
    if too_long:
        logger.warning("%s: %d prompts too long, skipped; the first: %s", name, len(too_long), too_long[0])
    if not prompts:
        raise InputError(f"{name}: no prompt fits the model's context")
    return prompts
