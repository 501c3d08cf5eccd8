"""The formats of a recipe: the name of each layout, and the function that lays a record out."""

from collections.abc import Callable, Mapping
from typing import Literal

from rekatrain.data.errors import InputError
from rekatrain.data.layouts import LAYOUTS, TURN_LAYOUTS
from rekatrain.data.library_layouts import LIBRARY_TURN_LAYOUTS, tokenized_row
from rekatrain.data.preferences import PREFERENCE_LAYOUTS, PREFERENCE_TURN_LAYOUTS
from rekatrain.data.records import Record, rename_keys
from rekatrain.data.rows import Row
from rekatrain.data.task_layouts import TASK_LAYOUTS
from rekatrain.data.turns import TurnOptions

Format = Literal[
    "messages",
    "prompt_answer",
    "prompt_completion",
    "sharegpt",
    "alpaca",
    "gsm8k",
    "mbpp",
    "humaneval",
    "svamp",
    "multiple_choice",
    "fill_in",
    "preference",
    "alpaca_preference",
    "hh",
    "rewardbench",
    "verl",
    "oasst",
    "tokenized",
]

RECORD_FORMATS: dict[str, Callable[[Record], Row]] = {
    **LAYOUTS,
    **TASK_LAYOUTS,
    **PREFERENCE_LAYOUTS,
    "tokenized": tokenized_row,
}
TURN_FORMATS: dict[str, Callable[[Record, TurnOptions], Row]] = {
    **TURN_LAYOUTS,
    **LIBRARY_TURN_LAYOUTS,
    **PREFERENCE_TURN_LAYOUTS,
    "rewardbench": PREFERENCE_TURN_LAYOUTS["preference"],  # data/rewardbench.py makes pairs of each row
    "oasst": TURN_LAYOUTS["messages"],  # data/oasst.py makes messages of each tree
}


def lay_out(format: Format, columns: Mapping[str, str], options: TurnOptions, record: object) -> Row:
    """Return the row of a record, whose keys are renamed first; raise InputError for a bad record, or for its error."""
    if isinstance(record, InputError):
        raise record
    if not isinstance(record, dict):
        raise InputError(f"a row must be a JSON object, not {type(record).__name__}")
    renamed = rename_keys(record, columns)
    return TURN_FORMATS[format](renamed, options) if format in TURN_FORMATS else RECORD_FORMATS[format](renamed)
