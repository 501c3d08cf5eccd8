"""TRL's fused LM head on fake tensors, as a GPU runs it.

On a CPU, torch works on the tiles of logits and makes temporaries of their size; on a GPU a Triton kernel works in the
tile, and products are added up in float32 without copies of their operands.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trl.kernels import chunked_logprob


def _in_place(*_: Any, **__: Any) -> None:
    """Allocate nothing: the result is written into an argument."""


@contextmanager
def kernels_of_a_gpu() -> Iterator[None]:
    """Context in which TRL's fused head allocates on fake tensors of a CPU what it allocates on a GPU."""
    names = ("_forward_tile", "_backward_tile", "_addmm_fp32")
    kept = {name: getattr(chunked_logprob, name) for name in names}
    try:
        for name in names:
            setattr(chunked_logprob, name, _in_place)
        yield
    finally:
        for name, function in kept.items():
            setattr(chunked_logprob, name, function)
