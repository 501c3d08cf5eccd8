"""Micro-batches: packed completions plus the tensors that their loss needs.

A group stays whole in a micro-batch where it fits, so that its advantages need no second pass. Lengths in `pack` are
those of the tokens that the model is run on: a prompt's, and a completion's without its last token.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from rekatrain.trainer.rloo.group import Group
from rekatrain.trainer.rloo.kernels.cpu import PassCost, num_tokens
from rekatrain.trainer.rloo.kernels.ulysses import SequenceGroup
from rekatrain.trainer.rloo.logprobs import PackedCompletions, pack_completions
from rekatrain.trainer.rloo.loss import LossDenominators, LossInputs
from rekatrain.trainer.rloo.sequence_parallel import pack_own_tokens, sequence_group


@dataclass(kw_only=True, eq=False)
class MicroBatch(LossInputs):
    """Completions of one forward and backward pass.

    packed:   the completions as the model reads them
    members:  group of each completion and its index in the group, [N]
    is_split: True where a group has other completions in another micro-batch
    is_copy:  True where another process of the sequence group records the completions
    """

    packed: PackedCompletions
    members: list[tuple[Group, int]]
    is_split: bool
    is_copy: bool = False


def balance_groups(accelerator: Accelerator, groups: Sequence[Group], cost: PassCost) -> list[Group]:
    """Exchange groups between processes, so that each trains about as long -> the groups that this one trains.

    Completions differ in length, and all processes wait for the slowest. Every process computes the same exchange. The
    processes of a sequence group train the same groups.
    """
    if accelerator.num_processes == 1:
        return list(groups)
    sequence, own = sequence_group(), accelerator.process_index
    size = sequence.size if sequence else 1
    costs: list[list[float]] = gather_object([[cost.of_group(*_lengths(group)) for group in groups]])
    items = [(rank, index) for rank, owned in enumerate(costs) for index in range(len(owned))]
    teams = [[item for item in items if item[0] // size == team] for team in range(len(costs) // size)]
    places = [
        [teams[team][number] for team, number in assigned]
        for assigned in assign([[costs[rank][index] for rank, index in team] for team in teams])
    ]
    is_moving = any(rank // size != team for team, assigned in enumerate(places) for rank, _ in assigned)
    trained = places[own // size] if is_moving else teams[own // size]
    held = {(own, index): group for index, group in enumerate(groups)}
    kept = {item: group for item, group in held.items() if item in trained}
    found = dict(kept)
    if is_moving:
        found |= dict(gather_object([(item, group) for item, group in held.items() if item not in kept]))
    if sequence:
        for others in sequence.collect(kept):
            found |= others
    return [found[item] for item in trained]


def assign(costs: Sequence[Sequence[float]]) -> list[list[tuple[int, int]]]:
    """Assign items to processes so that their sums are about equal -> for each process, its items.

    costs: for each process, the costs of the items that it has; an item is (process, index there)

    Each item, from the most expensive on, goes to the process with the least so far: the largest sum is at most 4/3 of
    the smallest possible one (Graham, "Bounds on multiprocessing timing anomalies", 1969). Items stay where they are if
    that is no better.

    >>> assign([[3.0, 3.0], [1.0, 1.0]])
    [[(0, 0), (1, 1)], [(0, 1), (1, 0)]]
    """
    items = [(-cost, rank, index) for rank, owned in enumerate(costs) for index, cost in enumerate(owned)]
    sums = [0.0] * len(costs)
    places: list[list[tuple[int, int]]] = [[] for _ in costs]
    for negative, rank, index in sorted(items):
        # Of equals it is the one that has the item.
        place = min(range(len(costs)), key=lambda process: (sums[process], process != rank, process))
        sums[place] -= negative
        places[place].append((rank, index))
    if max(sums) < max(sum(owned) for owned in costs):
        return places
    return [[(rank, index) for index in range(len(owned))] for rank, owned in enumerate(costs)]


def _lengths(group: Group) -> tuple[int, list[int]]:
    return len(group.prompt.ids), [len(completion.ids) - 1 for completion in group.completions]


def make_microbatches(
    accelerator: Accelerator, groups: Sequence[Group], max_tokens: int, cost: PassCost
) -> list[MicroBatch]:
    """Lay groups out in micro-batches of at most `max_tokens` tokens, about as much on each process.

    The tokens of a micro-batch are those of all processes of a sequence group together.
    """
    return list(_lay_out(accelerator, balance_groups(accelerator, groups, cost), max_tokens, cost))


def _lay_out(
    accelerator: Accelerator, groups: Sequence[Group], max_tokens: int, cost: PassCost
) -> Iterator[MicroBatch]:
    device, sequence = accelerator.device, sequence_group() if accelerator.num_processes > 1 else None
    packer = _packer(sequence)
    for parts in pack([_lengths(group) for group in groups], max_tokens, cost):
        members = [(groups[part.group], index) for part in parts for index in part.members]
        completions = [group.completions[index] for group, index in members]
        loss_mask = [index not in c.forced for c in completions for index in range(len(c.ids))]
        has_cutoffs = any(completion.cutoffs for completion in completions)
        packed = packer(
            [groups[part.group].prompt.ids for part in parts],
            [[groups[part.group].completions[index].ids for index in part.members] for part in parts],
            device,
            is_shared=[part.is_shared for part in parts],
            cutoffs=[cutoff for c in completions for cutoff in c.cutoffs] if has_cutoffs else None,
        )
        yield MicroBatch(
            packed=packed,
            members=members,
            is_split=any(len(part.members) < len(groups[part.group].completions) for part in parts),
            is_copy=sequence is not None and sequence.index > 0,
            lengths=packed.lengths,
            rewards=torch.tensor(
                [(group.scaled_rewards or group.rewards)[index] for group, index in members], device=device
            ),
            is_in_loss=torch.tensor([group.is_in_loss[index] for group, index in members], device=device),
            loss_mask=torch.tensor(loss_mask, device=device),
            sampler_logprobs=torch.tensor([logprob for c in completions for logprob in c.logprobs], device=device),
        )


def _packer(sequence: SequenceGroup | None) -> Callable[..., PackedCompletions]:
    return pack_completions if sequence is None else partial(pack_own_tokens, sequence)


def equal_passes(accelerator: Accelerator, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """Give every process as many micro-batches, each with as many chunks for the LM head, as every other.

    Under ZeRO each forward and backward pass is an exchange between processes, so all must make the same passes in the
    same order. A process that has too few gets micro-batches of a single token that are in no loss.
    """
    counts: list[list[int]] = gather_object([[batch.packed.num_chunks for batch in batches]])
    largest = [max(of_index) for of_index in zip_longest(*counts, fillvalue=1)]
    filled = [*batches, *(_filler(accelerator) for _ in largest[len(batches) :])]
    for batch, num_chunks in zip(filled, largest, strict=True):
        batch.packed = replace(batch.packed, num_chunks=num_chunks)
    return filled


def _filler(accelerator: Accelerator) -> MicroBatch:
    device = accelerator.device
    packed = _packer(sequence_group())([[0]], [[[0]]], device)
    nothing = torch.zeros(1, device=device)
    return MicroBatch(
        packed=packed,
        members=[],
        is_split=False,
        lengths=packed.lengths,
        rewards=torch.full((1,), torch.nan, device=device),
        is_in_loss=nothing.bool(),
        loss_mask=nothing.bool(),
        sampler_logprobs=nothing,
        advantages=nothing,
    )


def count_denominators(accelerator: Accelerator, groups: Sequence[Group]) -> LossDenominators:
    """Count the completions and the trained tokens in the loss of a step, over all processes."""
    lengths = [
        len(completion.ids) - len(completion.forced)
        for group in groups
        for completion, is_in_loss in zip(group.completions, group.is_in_loss, strict=True)
        if is_in_loss
    ]
    counts = torch.tensor([len(lengths), sum(lengths)], device=accelerator.device)
    num_completions, num_tokens = accelerator.reduce(counts, "sum").tolist()
    return LossDenominators(num_completions=num_completions, num_tokens=num_tokens)


@dataclass(frozen=True, kw_only=True)
class GroupPart:
    """Completions of one group that are in one micro-batch: all of them, unless the group is too large.

    group:     index of the group
    members:   indices of the completions in the group
    is_shared: True where the prompt is run once for all of them, False where it is run with each
    """

    group: int
    members: range
    is_shared: bool


def pack(groups: Sequence[tuple[int, Sequence[int]]], max_tokens: int, cost: PassCost) -> list[list[GroupPart]]:
    """Put groups, in order, into micro-batches of at most `max_tokens` tokens.

    groups: for each, the length of its prompt and of its completions

    A group that is too large is split. A single completion that is too large is a micro-batch alone.

    >>> cost = PassCost(token=1.0, pair=0.0, join=0.0)
    >>> [[(part.group, list(part.members)) for part in batch] for batch in pack([(2, [3, 3]), (1, [9, 4])], 9, cost)]
    [[(0, [0, 1])], [(1, [0])], [(1, [1])]]
    """
    batches: list[list[GroupPart]] = []
    room = 0
    for group, (prompt, completions) in enumerate(groups):
        is_shared = cost.shares_prompt(prompt, completions)
        first = 0
        while first < len(completions):
            end = len(completions)
            while end > first + 1 and num_tokens(prompt, completions[first:end], is_shared) > max_tokens:
                end -= 1
            needed = num_tokens(prompt, completions[first:end], is_shared)
            if needed > room or not batches:
                batches.append([])
                room = max_tokens
            batches[-1].append(GroupPart(group=group, members=range(first, end), is_shared=is_shared))
            room -= needed
            first = end
    return batches
