"""Measure peak memory by running the real code on fake tensors.

A fake tensor of torch has a shape, a dtype and a storage size, but no data. Code that runs on fake tensors allocates
and frees the same number of bytes as on real ones, including autograd's saved tensors and temporaries
(test_plan_memory.py compares the two).
"""

import copy
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Bytes by part. The type says int; values that are divided among processes are floats.
Parts = Counter[str]


class LiveMemory(TorchDispatchMode):
    """Count the bytes that are allocated inside this context, by part.

    live: bytes by part that are allocated now
    peak: bytes by part at the moment when their sum was largest
    """

    def __init__(self, existing: nn.Module, part_of: Callable[[Tensor], str]) -> None:
        """Start at zero bytes.

        existing: a module whose parameters and buffers are not counted
        part_of:  returns the name of the part that a new tensor belongs to
        """
        super().__init__()
        self._part_of = part_of
        self._parts: weakref.WeakKeyDictionary[torch.UntypedStorage, list[str]] = weakref.WeakKeyDictionary()
        for tensor in (*existing.parameters(), *existing.buffers()):
            self._parts[tensor.untyped_storage()] = []
        self.live: Parts = Counter()
        self.peak: Parts = Counter()

    def __torch_dispatch__(
        self,
        operator: Any,  # an overload of an operator, its arguments and its result
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = operator(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in self._parts:
                self._add(tensor)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage, part = tensor.untyped_storage(), [self._part_of(tensor)]
        self._parts[storage] = part
        self.live[part[0]] += storage.nbytes()
        weakref.finalize(storage, self._remove, part, storage.nbytes())
        if self.live.total() > self.peak.total():
            self.peak = Counter(self.live)

    def _remove(self, part: list[str], size: int) -> None:
        self.live[part[0]] -= size

    def restart(self) -> Parts:
        """Return the peak so far, and look for another from now on."""
        peak, self.peak = self.peak, Counter(self.live)
        return peak

    def move(self, tensor: Tensor, name: str) -> None:
        """Count a tensor that is already counted under the part `name` from now on."""
        storage = tensor.untyped_storage()
        part = self._parts[storage]
        self.live[part[0]] -= storage.nbytes()
        self.live[name] += storage.nbytes()
        part[0] = name


@contextmanager
def fake_tensors(model: nn.Module) -> Iterator[None]:
    """Make new tensors fake inside this context, and turn a model on the meta device into a fake one on the CPU."""
    created: dict[int, Tensor] = {}
    with FakeTensorMode():
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in created:  # tied weights stay tied
                        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                        is_weight = isinstance(tensor, nn.Parameter)
                        created[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_weight else empty
                    tensors[name] = created[id(tensor)]  # type: ignore[assignment]  # a parameter for a parameter
        yield


def extrapolate_layers(peak_of: Callable[[int], Parts], num_layers: int, few: tuple[int, int] = (2, 3)) -> Parts:
    """Return the peak of a deep model, in bytes by part, extrapolated linearly from the peaks of two shallow ones.

    peak_of: returns the peak of a model with this number of layers
    few:     the two numbers of layers that are measured

    >>> extrapolate_layers(lambda n: Counter(saved=10 * n, once=7), 44)
    Counter({'saved': 440, 'once': 7})
    """
    fewer, more = few
    if num_layers <= more:
        return peak_of(num_layers)
    low, high = peak_of(fewer), peak_of(more)
    peak = copy.copy(high)
    for part in high:
        peak[part] += (num_layers - more) * (high[part] - low[part]) // (more - fewer)
    return peak
