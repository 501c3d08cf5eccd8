"""Prompts: rows of a data set as the model reads them, and who samples which when."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rekatrain.data.chat import encode_text, render_prompt
from rekatrain.data.errors import InputError
from rekatrain.data.rows import Row
from rekatrain.data.sources import load_rows
from transformers import PretrainedConfig, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A row's prompt: its text, its ids, and the row that its rewards read."""

    text: str
    ids: list[int]
    row: Row


def load_prompts(
    section: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    model_config: PretrainedConfig,
    max_completion_length: int,
    name: str = "dataset",
) -> list[Prompt]:
    """Read a data set's prompts; each must leave room for a whole completion within the model's context."""
    prompts = []
    too_long = []
    for row in load_rows(**section).rows:
        text = render_prompt(row.prompt)
        prompt = Prompt(text=text, ids=encode_text(text, tokenizer), row=row)
        if len(prompt.ids) + max_completion_length > model_config.max_position_embeddings:
            too_long.append(
                f"{row.where}: the prompt has {len(prompt.ids)} tokens; with max_completion_length "
                f"{max_completion_length} it exceeds the model's context of {model_config.max_position_embeddings}"
            )
        else:
            prompts.append(prompt)
    if too_long and section.get("bad_rows", "refuse") == "refuse":
        raise InputError(f"{too_long[0]}; shorten it, or set {name}.bad_rows to skip")
    if too_long:
        logger.warning("%s: %d prompts too long, skipped; the first: %s", name, len(too_long), too_long[0])
    if not prompts:
        raise InputError(f"{name}: no prompt fits the model's context")
    return prompts


def step_prompts(num_prompts: int, *, seed: int, step: int, prompts_per_step: int, round_number: int = 0) -> list[int]:
    """Which prompts step `step` (from 0) samples, in an order shuffled anew each pass over the data.

    A function of its arguments alone, so that a resumed run neither repeats nor skips a prompt. A round above 0 gives
    the replacements of a step's prompts: drawn anew from the data, none of them a prompt of an earlier round as long as
    there are others.
    """
    if round_number:
        first = step_prompts(num_prompts, seed=seed, step=step, prompts_per_step=prompts_per_step)
        order = [int(place) for place in np.random.default_rng([2, seed, step]).permutation(num_prompts)]
        fresh = [place for place in order if place not in set(first)] or order
        start = (round_number - 1) * prompts_per_step
        return [fresh[place % len(fresh)] for place in range(start, start + prompts_per_step)]
    positions = range(step * prompts_per_step, (step + 1) * prompts_per_step)
    orders = {
        # The 0 keeps this stream apart from those of the draws (rollouts.py), which begin with 1, and the 2 above.
        epoch: np.random.default_rng([0, seed, epoch]).permutation(num_prompts)
        for epoch in {position // num_prompts for position in positions}
    }
    return [int(orders[position // num_prompts][position % num_prompts]) for position in positions]


def reward_columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Columns of the rows as reward functions take them: one list a column, None where a row lacks it."""
    names = sorted({name for row in rows for name in row.columns})
    return {name: [row.columns.get(name) for row in rows] for name in names}
