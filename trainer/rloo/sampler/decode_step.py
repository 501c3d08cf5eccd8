"""One decoding step over tensors with fixed addresses, which a GPU replays as a CUDA graph.

A step runs the decoder on the last token of each row and draws the next one. The host sends nothing and reads nothing
within a step: tokens, lengths, indices and uniform numbers lie on the device, where the step updates them. A GPU
therefore launches the thousands of kernels of a step at once (`CudaGraphs`); a CPU calls the same function.

Shapes: R rows of the batch, unused ones included; M members of the batch's slots, T tokens of a completion, V tokens of
the vocabulary.
"""

import logging
from collections.abc import Callable, Hashable
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rekatrain.trainer.rloo.kernels.grouped_attention import run_decoder
from rekatrain.trainer.rloo.sampler.static_cache import StaticCache

logger = logging.getLogger(__name__)

# Graphs that are kept. A graph of a large model takes tens of megabytes on the GPU.
MAX_GRAPHS = 32

Drawn = tuple[Tensor, Tensor, Tensor | None]  # ids, log-probabilities and cutoffs, as `draw` returns them
Result = TypeVar("Result")


class Calls(Protocol):
    """A way to call a function of tensors that keep their addresses."""

    def __call__(self, key: Hashable, function: Callable[[], Result]) -> Result:
        """Call the function; calls with equal keys run the same kernels on the same memory."""
        ...


class EagerCalls:
    """Calls the function."""

    def __call__(self, key: Hashable, function: Callable[[], Result]) -> Result:
        """Call the function."""
        return function()


class CudaGraphs:
    """Replays the CUDA graph of the function, which is captured at the second call with a key.

    The first call with a key runs the function, so that what is allocated or compiled once lies outside the graph; a
    shape that occurs once is never captured. A replay overwrites the result of the calls before it: copy from it first,
    on the same stream. Where a capture fails, all later calls run the function.
    """

    def __init__(self) -> None:
        """Begin without graphs; all of them share memory for what a step computes in between."""
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, object] | None] = {}
        self._can_capture = True
        self.num_replays = 0

    def __call__(self, key: Hashable, function: Callable[[], Result]) -> Result:
        """Run, or capture and replay."""
        if not self._can_capture:
            return function()
        if key not in self._graphs:
            if len(self._graphs) == MAX_GRAPHS:
                del self._graphs[next(iter(self._graphs))]  # the one that was used least recently
            self._graphs[key] = None
            return function()
        captured = self._graphs.pop(key) or self._capture(function)
        if captured is None:
            return function()
        self._graphs[key] = captured
        captured[0].replay()
        self.num_replays += 1
        return captured[1]  # type: ignore[return-value]  # the function's result

    def _capture(self, function: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph, object] | None:
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may use the GPU meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                result = function()
        except RuntimeError as error:  # a layer of another package may do what cannot be captured
            logger.warning("decoding without CUDA graphs, more slowly: a step cannot be captured: %s", error)
            self._can_capture = False
            return None
        return graph, result


class DecodeStep:
    """The next token of every row."""

    def __init__(
        self,
        halves: tuple[PreTrainedModel, nn.Module],
        cache: StaticCache,
        draw: Callable[[Tensor, Tensor], Drawn],
        uniforms_MT: Tensor,
        last_R: Tensor,
        calls: Calls,
    ) -> None:
        """Store the parts of a step.

        halves:      decoder and LM head
        draw:        logits [R, V] and uniform numbers [R] -> tokens
        uniforms_MT: uniform numbers by member of the cache
        last_R:      last token of each row, which a step overwrites with the next; both may be written between steps
        """
        self._decoder, self._head = halves
        self._cache = cache
        self._draw = draw
        self._uniforms_MT = uniforms_MT
        self._calls = calls
        self._last_R = last_R

    def __call__(self) -> Drawn:
        """Run the last tokens and draw the next; rows beyond the live completions are unused."""
        self._cache.reserve()
        drawn = self._calls(self._cache.shape, self._step)
        self._cache.advance()
        return drawn

    def _step(self) -> Drawn:
        cache, last_R = self._cache, self._last_R[: self._cache.num_rows]
        hidden_R1D = run_decoder(self._decoder, last_R[:, None], cache.position_ids, cache)
        drawn = self._draw(self._head(hidden_R1D[:, 0]), self._uniforms_MT[cache.members_N, cache.lengths_N])
        last_R.copy_(drawn[0])
        return drawn
