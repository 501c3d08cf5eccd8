"""Sequence parallelism: which processes split the tokens of a micro-batch, and who has which (kernels/ulysses.py).

The launch file says it as for stage sft: `parallelism_config: {parallelism_config_sp_size: 4}`. Ranks 0 to 3 are then a
sequence group, ranks 4 to 7 the next. Each process samples and scores its own prompts; all of a sequence group train
the same micro-batches, of which each holds the activations of a slice of the tokens.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from accelerate import Accelerator
from transformers import PretrainedConfig

from rekatrain.data.errors import InputError
from rekatrain.trainer.processes.launch import read_sequence_parallel
from rekatrain.trainer.rloo.kernels.ulysses import SequenceGroup, SlicedLayout
from rekatrain.trainer.rloo.logprobs import PackedCompletions, count_chunks, pack_completions

logger = logging.getLogger(__name__)

# The sequence group of this process, as torch.distributed has a default group.
_own: SequenceGroup | None = None


def connect_sequence_group(accelerator: Accelerator, *, ddp_timeout: float) -> None:
    """Connect the processes of each sequence group; every process must call it.

    ddp_timeout: seconds that a process waits for the others in an exchange
    """
    global _own
    size, _own = read_sequence_parallel(), None
    if size > 1:
        group, _ = dist.new_subgroups(group_size=size, timeout=timedelta(seconds=ddp_timeout))
        _own = SequenceGroup(size=size, index=accelerator.process_index % size, group=group)
        logger.info("sequences: each %d processes split the tokens of a micro-batch", size)


def sequence_group() -> SequenceGroup | None:
    """Return the sequence group of this process; None where each process has whole sequences."""
    return _own


def check_sequence_parallel(size: int, num_processes: int, config: PretrainedConfig) -> None:
    """Raise InputError for a size of sequence groups that does not divide the processes, or the heads of the model."""
    heads, shared = attention_heads(config)

    def can_be(size: int) -> bool:
        return num_processes % size == 0 and heads % size == 0 and (shared % size == 0 or size % shared == 0)

    if not can_be(size):
        others = [str(other) for other in range(1, num_processes + 1) if can_be(other)]
        reason = f"{num_processes} processes cannot be divided into groups of {size}"
        if num_processes % size == 0:
            reason = (
                f"the model has {heads} attention heads and {shared} key-value heads, which {size} processes cannot "
                "divide evenly"
            )
        raise InputError(
            f"parallelism_config_sp_size is {size}, but {reason}: with {num_processes} processes it can be "
            f"{' or '.join(others)}"
        )


def attention_heads(config: PretrainedConfig) -> tuple[int, int]:
    """Return the number of attention heads of a model, and of its key-value heads."""
    text = config.get_text_config()
    return text.num_attention_heads, getattr(text, "num_key_value_heads", None) or text.num_attention_heads


def pack_own_tokens(
    sequence: SequenceGroup,
    prompts: Sequence[list[int]],
    groups: Sequence[Sequence[list[int]]],
    device: torch.device,
    *,
    is_shared: Sequence[bool] | None = None,
    cutoffs: Sequence[float] | None = None,
) -> PackedCompletions:
    """Pack completions as `pack_completions` does -> those of its tokens that this process runs."""
    packed = pack_completions(prompts, groups, device, is_shared=is_shared, cutoffs=cutoffs, multiple_of=sequence.size)
    return split_tokens(packed, sequence)


def split_tokens(packed: PackedCompletions, sequence: SequenceGroup) -> PackedCompletions:
    """Return the slice of packed completions that this process runs, and the log-probabilities that it computes.

    packed: with a number of tokens that the size of the group divides

    A process scores the completion tokens whose predictor it has: they may be none.
    """
    input_ids = packed.input_ids.tensor_split(sequence.size, dim=1)[sequence.index]
    first = sequence.index * input_ids.shape[1]
    is_own_T = (packed.predictors >= first) & (packed.predictors < first + input_ids.shape[1])
    indices_T = is_own_T.nonzero()[:, 0]
    return replace(
        packed,
        input_ids=input_ids,
        layout=SlicedLayout(packed.layout, sequence),
        predictors=packed.predictors[indices_T] - first,
        targets=packed.targets[indices_T],
        num_chunks=count_chunks(len(indices_T)),
        cutoffs=None if packed.cutoffs is None else packed.cutoffs[indices_T],
        put_together=partial(sequence.put_together, indices_T=indices_T, num_tokens=len(packed.targets)),
    )
