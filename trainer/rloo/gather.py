"""Whole parameters where ZeRO-3 has them in shards; needs torch alone, as vLLM's environment does."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import nn


def gathered(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[object]:
    """Parameters whole within the context, on every process: an exchange where ZeRO-3 has them in shards."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters  # seconds to import, and only where it has been anyway

    context: AbstractContextManager[object] = GatheredParameters(parameters)
    return context
