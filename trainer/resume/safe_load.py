"""Read the states of a checkpoint without running code from it.

DeepSpeed reads its files with `torch.load(weights_only=False)`, which unpickles any object. torch has a variable that
forbids it, and a list of the classes that it may then make.
"""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rekatrain.data.errors import InputError

FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextmanager
def tensors_only() -> Iterator[None]:
    """Have every `torch.load` of this process read tensors, plain values and DeepSpeed's own records only.

    Raises InputError for a file with another object.
    """
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = os.environ.get(FORCED)
    os.environ[FORCED] = "1"
    try:
        with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
            yield
    except pickle.UnpicklingError as error:
        raise InputError(
            "the checkpoint holds an object other than tensors, which could run code and is not read: "
            f"{str(error).splitlines()[0]}"
        ) from error
    finally:
        if before is None:
            del os.environ[FORCED]
        else:
            os.environ[FORCED] = before
