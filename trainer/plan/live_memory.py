"""Memory of real code on tensors that have none: what is live, and the most that ever was, by part.

torch's fake tensors have shape, dtype and storage size and no data. A step that runs on them allocates and frees what
it would on real ones, to the byte (test_plan_memory.py), autograd's saved tensors and temporaries included.
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

# Bytes by part; typed for whole numbers, and holding shares of them too.
Parts = Counter[str]


class LiveMemory(TorchDispatchMode):
    """Counts the bytes of what is allocated within it, each under the part that `part_of` says.

    peak: the parts at the moment when their sum was largest
    """

    def __init__(self, existing: nn.Module, part_of: Callable[[Tensor], str]) -> None:
        """`existing`: its parameters and buffers were there before and are not counted."""
        super().__init__()
        self._part_of = part_of
        self._parts: weakref.WeakKeyDictionary[torch.UntypedStorage, list[str]] = weakref.WeakKeyDictionary()
        for tensor in (*existing.parameters(), *existing.buffers()):
            self._parts[tensor.untyped_storage()] = []
        self.live: Parts = Counter()
        self.peak: Parts = Counter()

    def __torch_dispatch__(
        self,
        operator: Any,  # an overload of an operator, with whatever it takes and gives
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

    def move(self, tensor: Tensor, name: str) -> None:
        """Count what is there already under another part."""
        storage = tensor.untyped_storage()
        part = self._parts[storage]
        self.live[part[0]] -= storage.nbytes()
        self.live[name] += storage.nbytes()
        part[0] = name


@contextmanager
def pretended(model: nn.Module) -> Iterator[None]:
    """Within it, tensors that are made have no data; a model on the meta device becomes one on a CPU without data."""
    made: dict[int, Tensor] = {}
    with FakeTensorMode():
        for module in model.modules():
            for held in (module._parameters, module._buffers):
                for name, tensor in held.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in made:  # tied weights stay tied
                        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                        is_weight = isinstance(tensor, nn.Parameter)
                        made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_weight else empty
                    held[name] = made[id(tensor)]  # type: ignore[assignment]  # of the kind that was there
        yield


def over_layers(peak_of: Callable[[int], Parts], num_layers: int, few: tuple[int, int] = (2, 3)) -> Parts:
    """A peak with many layers, from those with few: each further layer adds what the last of the few added.

    >>> over_layers(lambda n: Counter(saved=10 * n, once=7), 44)
    Counter({'saved': 440, 'once': 7})
    """
    fewer, more = few
    if num_layers <= more:
        return peak_of(num_layers)
    less, base = peak_of(fewer), peak_of(more)
    grown = copy.copy(base)
    for part in base:
        grown[part] += (num_layers - more) * (base[part] - less[part]) // (more - fewer)
    return grown
