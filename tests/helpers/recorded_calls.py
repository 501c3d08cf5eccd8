"""A CUDA graph on a CPU: the operators of a call are recorded with their memory, and run again without its Python."""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# Operators that wait for the device, or bring values of the host to it: a capture fails at them.
WAITING = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.lift_fresh, aten.is_nonzero, aten.equal}
INDEXING = {aten.index, aten.index_put, aten.index_put_}
Result = TypeVar("Result")


def storages(values: object) -> set[int]:
    """Return the storages of all tensors in a nested value."""
    return {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}


class Recording(TorchDispatchMode):
    """Record the operators of a call; raise RuntimeError at those that a capture rejects."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run and record an operator. A view needs no second run: its memory is that of its argument."""
        # The number of values that a mask selects is known on the device alone.
        is_masked = func.overloadpacket in INDEXING and any(
            isinstance(leaf, Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1])
        )
        if is_masked or func.overloadpacket in WAITING:
            raise RuntimeError(f"{func} waits for the device, or reads the host's memory")
        result = func(*args, **(kwargs or {}))
        if func._schema.is_mutable or not storages(result) & storages((args, kwargs)):
            self.operators.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """Run the operators again on the memory that they used."""
        for func, args, kwargs, recorded in self.operators:
            result = func(*args, **kwargs)
            if not func._schema.is_mutable:
                for old, new in zip(tree_leaves(recorded), tree_leaves(result), strict=True):
                    if isinstance(old, Tensor):
                        old.copy_(new)


class RecordedCalls:
    """Runs the first call with a key, records the second and replays it from then on, as `CudaGraphs` does."""

    def __init__(self) -> None:
        self.recordings: dict[Hashable, tuple[Recording, object] | None] = {}
        self.num_replays = 0

    def __call__(self, key: Hashable, function: Callable[[], Result]) -> Result:
        """Run, record or replay."""
        if key not in self.recordings:
            self.recordings[key] = None
            return function()
        recorded = self.recordings[key]
        if recorded is None:
            recording = Recording()
            with recording:
                result: Any = function()
            self.recordings[key] = recording, result
            return result
        self.num_replays += 1
        recorded[0].replay()
        return recorded[1]  # type: ignore[return-value]  # the function's result
