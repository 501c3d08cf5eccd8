"""Attention of processes that split a sequence: DeepSpeed-Ulysses (Jacobs et al., arXiv 2309.14509) for packed groups.

Each process of a sequence group runs the decoder on a slice of the tokens. All layers but attention work on one token
at a time. Attention works on one head at a time: an exchange gives each process all tokens of its part of the heads,
and after attention a second exchange gives it all heads of its slice. DeepSpeed's class and TRL's use of it have one
causal sequence; here the layout of the packed groups attends, so that a prompt is still run once for its completions.

Shapes: P processes of a group, S tokens and s = S / P of a slice, T tokens of the completions, H heads, K key-value
heads, D size of a head.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from rekatrain.trainer.rloo.kernels.grouped_attention import Layout


@dataclass(frozen=True, kw_only=True)
class SequenceGroup:
    """The processes that split the tokens of each micro-batch among them.

    size:  number of processes
    index: index of this process among them, and of its slice
    group: the process group that connects them
    """

    size: int
    index: int
    group: dist.ProcessGroup

    def exchange(self, states: Tensor) -> Tensor:
        """Send `states[i]` to process i -> [P, ...], what each process has sent to this one; differentiable."""
        return cast(Tensor, _Exchange.apply(states, self.group))

    def put_together(self, own_T: Tensor, indices_T: Tensor, num_tokens: int) -> Tensor:
        """Put the log-probabilities of all processes together -> [T], the same bits on each of them.

        own_T:      log-probabilities of this process, with gradient
        indices_T:  their indices among all; each index is on one process
        num_tokens: T

        Every process computes the loss of all tokens from them, and each gradient flows back into its own tokens
        only: added up over the processes, the gradients of the weights are those of one process.
        """
        return cast(Tensor, _PutTogether.apply(own_T, indices_T, num_tokens, self.group))

    def collect(self, value: Any) -> list[Any]:
        """Return the values of all processes, which are pickled."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values


class _Exchange(torch.autograd.Function):
    """An all-to-all, whose gradient is the same exchange. The functions of torch.distributed.nn are deprecated."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, group: dist.ProcessGroup) -> Tensor:  # autograd's own context
        """Exchange the states."""
        ctx.group = group
        return _exchanged(states, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Send each gradient back to the process that the state came from."""
        return _exchanged(gradients[0], ctx.group), None


def _exchanged(states: Tensor, group: dist.ProcessGroup) -> Tensor:
    states = states.contiguous()
    received = torch.empty_like(states)
    dist.all_to_all_single(received, states, group=group)
    return received


class _PutTogether(torch.autograd.Function):
    """See `SequenceGroup.put_together`."""

    @staticmethod
    def forward(
        ctx: Any,  # autograd's own
        own_T: Tensor,
        indices_T: Tensor,
        num_tokens: int,
        group: dist.ProcessGroup,
    ) -> Tensor:
        """Add up vectors that are 0 but for the log-probabilities of one process."""
        all_T = own_T.new_zeros(num_tokens).index_copy_(0, indices_T, own_T)
        dist.all_reduce(all_T, group=group)
        ctx.save_for_backward(indices_T)
        return all_T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the own log-probabilities."""
        (indices_T,) = ctx.saved_tensors
        return gradients[0][indices_T], None, None, None


class SlicedLayout:
    """The layout of a slice of the tokens: attention over all of them, under the layout of the whole."""

    def __init__(self, whole: Layout, sequence: SequenceGroup) -> None:
        """Slice a layout whose number of tokens the size of the group divides."""
        self._whole = whole
        self._sequence = sequence

    @property
    def position_ids(self) -> Tensor:
        """Positions of the tokens of this process, [1, s]."""
        return self._whole.position_ids.tensor_split(self._sequence.size, dim=1)[self._sequence.index]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Attend with query [1, H, s, D], key and value [1, K, s, D] -> [1, s, H, D]."""
        P = self._sequence.size
        if key.shape[1] < P:  # several processes have query heads of the same key-value head
            key, value = (states.repeat_interleave(P // states.shape[1], dim=1) for states in (key, value))
        parts = [states[0].unflatten(0, (P, -1)) for states in (query, key, value)]
        slices = self._sequence.exchange(torch.cat(parts, dim=1))
        heads = slices.transpose(0, 1).flatten(1, 2).split([part.shape[1] for part in parts])
        query, key, value = (states[None] for states in heads)
        output = self._whole.attend(layer, query, key, value, scaling)
        own = self._sequence.exchange(output[0].unflatten(0, (P, -1)))
        return own.transpose(0, 1).flatten(1, 2)[None]
