"""Layouts that other training libraries read: TRL's prompt and completion, verl's rows, and rows of token ids."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress

from rekatrain.data.chat import IGNORED_LABEL, EncodedRow
from rekatrain.data.errors import InputError
from rekatrain.data.prime import columns_of_tests
from rekatrain.data.records import (
    PROMPT_KEYS,
    Record,
    assistant_message,
    field_error,
    number_as_text,
    other_columns,
    read_text,
)
from rekatrain.data.rows import Row
from rekatrain.data.turns import DEFAULT, TurnOptions, holds_turns, read_prompt, read_turns

TOKEN_MASKS = ("completion_mask", "assistant_masks")


def prompt_completion_row(record: Record, options: TurnOptions = DEFAULT) -> Row:
    """Row of `prompt` and `completion`, each text or turns, as TRL has it; turns of the prompt are not trained."""
    messages, trains = read_prompt(record, options)
    if holds_turns(record.get("completion")):
        turns = read_turns(record, "completion", options)
        answers, answer_trains = turns.messages, turns.trains or [True] * len(turns.messages)
    else:
        answers, answer_trains = [assistant_message(read_text(record, "completion"))], [True]
    return Row(
        messages=[*messages, *answers],
        trains=[*trains, *answer_trains],
        columns=other_columns(record, "prompt", "completion", *PROMPT_KEYS),
    )


def verl_row(record: Record, options: TurnOptions = DEFAULT) -> Row:
    """Row of verl: `prompt` as turns, and `reward_model.ground_truth`, which becomes the column `answer`.

    Tests of code, as PRIME has them there, become the column `tests`.
    """
    judged = record.get("reward_model")
    if isinstance(judged, str):  # a cell of a table
        with suppress(ValueError):
            judged = json.loads(judged)
    truth = judged.get("ground_truth") if isinstance(judged, dict) else None
    if truth is None:
        raise InputError("there is no reward_model.ground_truth: set format or columns to match the file")
    messages, trains = read_prompt(record, options)
    columns = {**other_columns(record, "prompt", *PROMPT_KEYS), "answer": number_as_text(truth) or truth}
    columns |= columns_of_tests(record, truth)
    return Row(messages=messages, trains=trains, columns=columns)


def tokenized_row(record: Record) -> Row:
    """Row of `input_ids` with `labels`, or with a mask of 0 and 1 (`completion_mask`, `assistant_masks`).

    Labels are as `EncodedRow` has them: the ids of the trained tokens, not shifted, and -100 elsewhere.
    """
    ids = _read_ints(record, "input_ids")
    masks = [key for key in ("labels", *TOKEN_MASKS) if record.get(key) is not None]
    if len(masks) != 1:
        found = " and ".join(masks) or "none"
        raise InputError(f"a row of input_ids needs one of labels, {' and '.join(TOKEN_MASKS)}; it has {found}")
    values = _read_ints(record, masks[0])
    if len(values) != len(ids):
        raise InputError(f"{masks[0]} has {len(values)} numbers, and input_ids has {len(ids)}")
    if masks[0] == "labels":
        labels = values
        wrong = next((i for i, label in enumerate(labels) if label not in (ids[i], IGNORED_LABEL)), None)
        if wrong is not None:
            raise InputError(
                f"labels[{wrong}] is {labels[wrong]}, neither input_ids[{wrong}] ({ids[wrong]}) nor -100: labels are "
                "not shifted"
            )
    elif set(values) - {0, 1}:
        raise InputError(f"{masks[0]} must hold only 0 and 1")
    else:
        labels = [token if trained else IGNORED_LABEL for token, trained in zip(ids, values, strict=True)]
    # The first token is predicted by nothing.
    if all(label == IGNORED_LABEL for label in labels[1:]):
        raise InputError("no token of the row is trained: its labels are all -100, or its mask is all 0")
    if any(value != 1 for value in record.get("attention_mask") or []):
        raise InputError("attention_mask is not all 1: remove the padding, rows are padded or packed by the trainer")
    columns = other_columns(record, "input_ids", "attention_mask", masks[0])
    return Row(messages=[], tokens=EncodedRow(input_ids=ids, labels=labels), columns=columns)


LIBRARY_TURN_LAYOUTS: dict[str, Callable[[Record, TurnOptions], Row]] = {
    "prompt_completion": prompt_completion_row,
    "verl": verl_row,
}


def _read_ints(record: Record, key: str) -> list[int]:
    values = record.get(key)
    if not isinstance(values, Sequence) or not all(type(value) is int for value in values) or not values:
        raise field_error(record, key, "a list of whole numbers")
    return list(values)
