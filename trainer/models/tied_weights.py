"""Weights that a config.json ties to one matrix, and that the files of the model store twice, with separate values.

transformers then leaves them apart, and other programs (vLLM, llama.cpp) read one of them: the model that is trained
would not be the one that is served.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from rekatrain.data.errors import InputError
from rekatrain.trainer.models.weight_files import stored_names

# Rows of a matrix that are compared at once: 128 MB of 8192 columns in float32.
NUM_ROWS = 4096


def check_tied_files(base: str, folder: Path, skeleton: PreTrainedModel) -> None:
    """Raise InputError if the safetensors files of a folder store other values for two tensors that are one.

    Nothing but pairs that are stored twice is read. Shapes are checked elsewhere.

    skeleton: the model that config.json builds, without weights
    """
    files = stored_names(folder)
    for name, of in tied_names(skeleton).items():
        if name in files and of in files and not _are_equal(files, name, of):
            raise _contradiction(base, name, of)


def check_tied_model(base: str, model: PreTrainedModel) -> None:
    """Raise InputError if a loaded model has two parameters where its config says one, whatever its files are."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, of in tied_names(model).items():
        if name in parameters and of in parameters and parameters[name] is not parameters[of]:
            raise _contradiction(base, name, of)


def tied_names(model: PreTrainedModel) -> dict[str, str]:
    """Return the names that the config ties, each with the name whose parameter it shares."""
    # The attribute all_tied_weights_keys lacks those that the loader found to be apart.
    return dict(model.get_expanded_tied_weights_keys(all_submodels=True))


def _are_equal(files: Mapping[str, Path], name: str, of: str) -> bool:
    with safe_open(files[name], framework="pt") as first, safe_open(files[of], framework="pt") as second:
        ours, theirs = first.get_slice(name), second.get_slice(of)
        if ours.get_shape() != theirs.get_shape():
            return True
        return all(
            torch.equal(ours[start : start + NUM_ROWS].float(), theirs[start : start + NUM_ROWS].float())
            for start in range(0, ours.get_shape()[0], NUM_ROWS)
        )


def _contradiction(base: str, name: str, of: str) -> InputError:
    return InputError(
        f"the config.json of {base!r} ties {name} to {of} (tie_word_embeddings), and its files store two matrices: set "
        f"tie_word_embeddings to false in config.json if the model has both, or else remove {name} from the files"
    )
