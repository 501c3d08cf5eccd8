"""The states of objects of a run in a checkpoint: JSON values in one file, numpy arrays in another.

Accelerate would pickle them, and a pickle runs code when it is read. Token ids and log-probabilities are arrays, for a
queue of long completions has millions of them.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from rekatrain.data.errors import InputError

RUN_STATE_FILE = "run_state.json"
RUN_ARRAYS_FILE = "run_state.safetensors"
PICKLES = "custom_checkpoint_*.pkl"
# In JSON, an array is an object with this key alone, and the name of the array in the other file.
ARRAY = "__array__"


def write_states(checkpoint: Path, states: dict[str, Any]) -> None:
    """Write states of JSON values and numpy arrays into a checkpoint's folder."""
    arrays: dict[str, np.ndarray] = {}

    def take_arrays(array: object) -> dict[str, str]:
        if not isinstance(array, np.ndarray):
            raise TypeError(f"{type(array).__name__} is neither a JSON value nor an array")
        name = str(len(arrays))
        arrays[name] = array
        return {ARRAY: name}

    text = json.dumps(states, default=take_arrays)
    (checkpoint / RUN_STATE_FILE).write_text(text, encoding="utf-8")
    if arrays:
        save_file(arrays, checkpoint / RUN_ARRAYS_FILE)


def read_states(checkpoint: Path) -> dict[str, Any]:
    """Return the states of a checkpoint; InputError if they are missing, damaged or in a pickle.

    Checkpoints of earlier versions have no arrays: lists of numbers are in their place.
    """
    pickles = sorted(path.name for path in checkpoint.glob(PICKLES))
    if pickles:
        raise InputError(
            f"{str(checkpoint)!r} holds {pickles[0]}, a pickle, which can run code and is not read: an earlier version "
            "wrote it; resume it with that version, or start a new run from its weights"
        )
    path = checkpoint / RUN_ARRAYS_FILE
    try:
        arrays = load_file(path) if path.exists() else {}
        path = checkpoint / RUN_STATE_FILE
        states = json.loads(
            path.read_text(encoding="utf-8"),
            object_hook=lambda item: arrays[item[ARRAY]] if item.keys() == {ARRAY} else item,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = f"array {error} is missing" if isinstance(error, KeyError) else error
        raise InputError(
            f"{str(path)!r} cannot be read ({reason}): delete this checkpoint to resume from the one before it"
        ) from error
    assert isinstance(states, dict)
    return states
