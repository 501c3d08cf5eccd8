"""Encode conversations as SFT rows: the ids, and labels on every trained turn.

A conversation is one row with several labeled spans wherever its turns can share one context. They cannot where a turn
has reasoning: it is trained with it, and later turns are trained without it, as the chat template shows it to them.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from transformers import PreTrainedTokenizerBase

from rekatrain.data.chat import (
    IGNORED_LABEL,
    EncodedRow,
    EndOfTurn,
    answers_only,
    encode_row,
    encode_text,
    render_completion,
    render_prompt,
    split_turn,
)
from rekatrain.data.errors import InputError
from rekatrain.data.rows import LongRows, Row

logger = logging.getLogger(__name__)

TrainedTurns = Literal["all", "last"]
NUM_NAMED = 10  # rows that a message names


def encode_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    end_of_turn: EndOfTurn = "sep",
    turns: TrainedTurns = "all",
) -> list[EncodedRow]:
    """Encode rows of at most `max_length` tokens, as `encode_conversation` does.

    Rows that cannot be trained and rows that are too long are rejected, left out or cut, as their source says
    (`bad_rows`, `long_rows`). Raises InputError, which names the rows, and where none is left.
    """
    encoded: list[EncodedRow] = []
    bad: list[str] = []
    long: dict[LongRows, dict[str, int]] = {"refuse": {}, "skip": {}, "truncate": {}}
    for row in rows:
        try:
            made = encode_conversation(row, tokenizer, end_of_turn=end_of_turn, turns=turns)
        except InputError as error:
            message = f"{row.where}: {error}"
            if row.source.bad_rows == "refuse":
                raise InputError(message) from error
            bad.append(message)
            continue
        for one in made:
            if len(one.input_ids) <= max_length:
                encoded.append(one)
                continue
            # TRL would cut off the end of the row, and with it the stop: the model would learn not to stop.
            cut = cut_row(one, max_length) if row.source.long_rows == "truncate" else None
            encoded += [cut] if cut else []
            policy = "skip" if row.source.long_rows == "truncate" and not cut else row.source.long_rows
            long[policy][row.where] = len(one.input_ids)
    if bad:
        logger.warning("%d rows that cannot be trained skipped; the first: %s", len(bad), bad[0])
    limit = f"longer than {max_length} tokens (the smaller of sft.max_length and the model's context)"
    too_long = long["refuse"] or (not encoded and (long["skip"] or long["truncate"]))
    if too_long:
        raise InputError(
            f"{len(too_long)} of {len(rows)} rows are {limit}: {_list_some(too_long)}; raise sft.max_length, or set "
            "dataset.long_rows to skip or truncate"
        )
    if not encoded:
        raise InputError(f"no row can be trained; the first: {bad[0]}")
    for done, named in (("skipped", long["skip"]), ("cut after the last trained turn that fits", long["truncate"])):
        if named:
            logger.warning("%d of %d rows are %s; %s: %s", len(named), len(rows), limit, done, _list_some(named))
    return encoded


def encode_conversation(
    row: Row, tokenizer: PreTrainedTokenizerBase, *, end_of_turn: EndOfTurn = "sep", turns: TrainedTurns = "all"
) -> list[EncodedRow]:
    """Return the rows that train the conversation's assistant turns, or the last one.

    Each trained turn has labels in exactly one row, on the ids and after the context that `encode_row` gives it. A turn
    shares a row with later ones only where it has no reasoning and ends with `<sep>`, as in their context.
    Raises InputError where there is no turn to train, or where one has no answer.
    """
    if row.tokens is not None:
        _check_ids(row.tokens, len(tokenizer))
        return [row.tokens]
    trains = row.trains or [True] * len(row.messages)
    trained = [index for index, message in enumerate(row.messages) if message["role"] == "assistant" and trains[index]]
    if not trained:
        raise InputError("no assistant message to train; stage sft needs one in every row")
    encoded: list[EncodedRow] = []
    shared: list[int] = []
    for index in trained if turns == "all" else trained[-1:]:
        reasoning, answer = split_turn(row.messages[index])
        if not answer:
            raise InputError("the assistant message to train has no answer")
        shared.append(index)
        if reasoning is not None or end_of_turn != "sep" or index == trained[-1]:
            encoded += _encode_turns(row, shared, tokenizer, end_of_turn)
            shared = []
    return encoded


def cut_row(row: EncodedRow, max_length: int) -> EncodedRow | None:
    """Return the row up to the end of the last labeled span that fits into `max_length` tokens, or None."""
    following = [*row.labels[1:], IGNORED_LABEL]
    ends = [
        position
        for position, (label, after) in enumerate(zip(row.labels, following, strict=True), start=1)
        if label != IGNORED_LABEL and after == IGNORED_LABEL and position <= max_length
    ]
    return EncodedRow(input_ids=row.input_ids[: ends[-1]], labels=row.labels[: ends[-1]]) if ends else None


def _encode_turns(
    row: Row, indices: Sequence[int], tokenizer: PreTrainedTokenizerBase, end_of_turn: EndOfTurn
) -> list[EncodedRow]:
    """Encode one row with a span for each turn, or a row for each where the ids of the spans would differ."""
    *earlier, last = indices
    encoded = encode_row(row.messages[: last + 1], tokenizer, end_of_turn)
    labels = list(encoded.labels)
    ids: list[int] = []
    text = ""
    for index in earlier:
        prompt = render_prompt(answers_only(row.messages[:index]))
        completion = render_completion(None, split_turn(row.messages[index])[1])
        ids += encode_text(prompt.removeprefix(text), tokenizer)
        start = len(ids)
        ids += encode_text(completion, tokenizer)
        labels[start : len(ids)] = ids[start:]
        text = prompt + completion
    # The whole prompt is encoded as one text. A tokenizer that merges over the end of a turn gives it other ids.
    if encoded.input_ids[: len(ids)] == ids:
        return [replace(encoded, labels=labels)]
    return [*(encode_row(row.messages[: index + 1], tokenizer, end_of_turn) for index in earlier), encoded]


def _check_ids(row: EncodedRow, num_ids: int) -> None:
    wrong = next((token for token in row.input_ids if not 0 <= token < num_ids), None)
    if wrong is not None:
        raise InputError(f"input_ids holds {wrong}, and the tokenizer has the ids 0 to {num_ids - 1}")


def _list_some(lengths: Mapping[str, int]) -> str:
    """Return the origins and lengths of the first rows, and the number of the others."""
    named = [f"{where} ({length} tokens)" for where, length in lengths.items()]
    more = f" and {len(named) - NUM_NAMED} more" if len(named) > NUM_NAMED else ""
    return ", ".join(named[:NUM_NAMED]) + more
