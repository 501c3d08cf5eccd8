"""Preference rows encoded for a reward model: two answers to one prompt."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from rekatrain.data.chat import render_prompt, split_turn
from rekatrain.data.errors import InputError
from rekatrain.data.mixture import Section, load_mixture
from rekatrain.data.reward_model_input import RewardModelIds, RewardModelInput, encode_reward_model_input
from rekatrain.data.rows import Row

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One preference.

    prompt:           the rendered prompt of both answers
    chosen, rejected: the encoded conversations, in the Reka format
    margin:           the least difference of scores that `chosen` should win by; None if no row has a margin
    where:            the row's file and line, for messages
    source:           the row's `subset` if it has one, as in RewardBench, or else the name of its source
    """

    prompt: str
    chosen: RewardModelIds
    rejected: RewardModelIds
    margin: float | None
    where: str
    source: str = ""


def encode_pairs(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, *, reasoning: bool = False) -> list[Pair]:
    """Encode preference rows, with the reasoning of both answers if `reasoning`.

    Raise InputError, which names the row, for a row without a rejected answer, for two answers that are equal without
    their reasoning, and for margins in some rows but not in others.
    """
    with_margin = [row for row in rows if row.columns.get("margin") is not None]
    pairs = []
    for row in rows:
        if row.rejected is None:
            raise InputError(
                f"{row.where}: there is no rejected answer; stage reward needs preference rows: set format to "
                "preference, alpaca_preference or hh"
            )
        chosen, rejected = (_input(row, messages, reasoning) for messages in (row.messages, row.rejected))
        if chosen == rejected:
            raise InputError(f"{row.where}: the answers differ in their reasoning alone; set chat.reasoning to true")
        margin = row.columns.get("margin")
        if margin is None and with_margin:
            raise InputError(f"{row.where} has no margin, but {with_margin[0].where} has one: give every row one")
        pairs.append(
            Pair(
                prompt=render_prompt(row.prompt),
                chosen=_encode(chosen, tokenizer),
                rejected=_encode(rejected, tokenizer),
                margin=None if margin is None else float(margin),
                where=row.where,
                source=str(row.columns.get("subset") or row.source.name),
            )
        )
    return pairs


def load_pairs(
    section: Section | Sequence[Section],
    tokenizer: PreTrainedTokenizerBase,
    chat: Mapping[str, Any],
    *,
    max_length: int,
    name: str = "dataset",
) -> list[Pair]:
    """Read and encode a data set's preferences, without truncation.

    Raise InputError for a pair longer than `max_length` tokens. With `bad_rows: skip` such pairs are skipped, their
    number is logged, and InputError is raised only if none is left.
    """
    rows = load_mixture(section, name).rows
    pairs = encode_pairs(rows, tokenizer, **chat)
    fitting: list[Pair] = []
    too_long: list[Pair] = []
    is_refused = False
    for row, pair in zip(rows, pairs, strict=True):
        is_too_long = max(len(pair.chosen.input_ids), len(pair.rejected.input_ids)) > max_length
        is_refused |= is_too_long and row.source.long_rows != "skip"
        (too_long if is_too_long else fitting).append(pair)
    if too_long:
        message = (
            f"{name}: {len(too_long)} of {len(pairs)} pairs are longer than {max_length} tokens (the smaller of "
            f"reward.max_length and the model's context); the first is {too_long[0].where}"
        )
        if is_refused or not fitting:
            raise InputError(f"{message}; raise reward.max_length, or set {name}.bad_rows to skip")
        logger.warning("%s; skipped", message)
    return fitting


def leave_out_trained(held_out: Sequence[Pair], trained: Sequence[Pair]) -> list[Pair]:
    """Return the pairs of `held_out` whose prompt is in no pair of `trained`; log the number left out.

    Raise InputError if none is left.
    """
    seen = {pair.prompt for pair in trained}
    unseen = [pair for pair in held_out if pair.prompt not in seen]
    if len(unseen) < len(held_out):
        logger.warning(
            "%d of %d pairs of eval_dataset are left out: their prompts are in dataset too",
            len(held_out) - len(unseen),
            len(held_out),
        )
    if not unseen:
        raise InputError("every prompt of eval_dataset is in dataset too: there is nothing held out")
    return unseen


def _input(row: Row, messages: Sequence[Any], reasoning: bool) -> RewardModelInput:  # Any: Message, a TypedDict
    thought, answer = split_turn(messages[-1])
    if not answer:
        raise InputError(f"{row.where}: an answer is empty apart from its reasoning")
    return RewardModelInput(prompt=row.prompt, answer=answer, reasoning=thought if reasoning else None)


def _encode(answer: RewardModelInput, tokenizer: PreTrainedTokenizerBase) -> RewardModelIds:
    return encode_reward_model_input(answer, tokenizer, "reka", max_length=10**9)
