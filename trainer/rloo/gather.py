"""Gather whole parameters where ZeRO-3 shards them. Imports torch alone, so that vLLM's environment can import it."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import nn


def gathered(parameters: Sequence[nn.Parameter]) -> AbstractContextManager[object]:
    """Make parameters whole on every process within the context; where ZeRO-3 shards them, every process must enter."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters  # slow to import; sharded parameters have imported it already

    context: AbstractContextManager[object] = GatheredParameters(parameters)
    return context
