"""The key-value cache of a batch that is being sampled: a prompt's states once per group, completions' beside them.

A call with one token per completion reads and writes memory at fixed addresses, and what differs from token to token
lies in tensors on the device: `shape` names all else, so a CUDA graph of the call can be replayed while it stays equal.
On a GPU shapes are rounded up (`bucket`), so that few of them occur; rows and tokens beyond are masked or dropped.

Shapes: H heads, K key-value heads, h = H / K heads that share one, D size of a head; P slots of prompts, G completions
per prompt, N completions that have not ended yet, R >= N rows of a call, L tokens per prompt and T per completion.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rekatrain.trainer.rloo.kernels.grouped_attention import PackedGroups

# Tokens per completion that are allocated at first; the allocation doubles when it is full.
FIRST_ROOM = 64


def bucket(number: int) -> int:
    """Round up to a number with three binary digits before its zeros: at most a quarter is added.

    >>> [bucket(number) for number in (0, 3, 7, 9, 11, 17, 33, 64, 65, 1000)]
    [0, 3, 7, 10, 12, 20, 40, 64, 80, 1024]
    """
    unit = 1 << max(0, number.bit_length() - 3)
    return -(-number // unit) * unit


def send(values: Sequence[int] | Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Send integers to a device, without waiting for what runs there."""
    on_host = torch.tensor(values, dtype=torch.long)
    return on_host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else on_host.to(device)


class ForkedCache:
    """The layout of prompts' calls of the model, and of calls with one new token per live completion.

    The states of completions lie in the order of the batch; `_members` says which completion each one is. When
    completions end, those at the end of the batch move to their indices, and nothing else moves. Later groups are
    admitted to the rows behind; their completions are shorter than the earlier ones'.
    """

    def __init__(
        self,
        prompt_lengths: Sequence[int],
        num_generations: int,
        max_length: int,
        device: torch.device,
        *,
        is_static: bool | None = None,
        max_prompts: int = 0,
        longest_prompt: int = 0,
    ) -> None:
        """Admit the first groups.

        is_static:      round shapes up, so that few occur; None: on a GPU only
        max_prompts:    prompts for which there is room; more of them, or longer ones, take new memory
        longest_prompt: tokens of a prompt for which there is room
        """
        self._num_generations = num_generations
        self._max_length = max_length
        self._device = device
        self._is_static = device.type == "cuda" if is_static is None else is_static
        # Prompts lie in slots. The first call of each layer, and the first after an admission, is that of new prompts.
        self._prompt_room = max(max_prompts, len(prompt_lengths)), max(longest_prompt, *prompt_lengths)
        self._prompt_lengths: list[int] = []
        self._new_slots: list[int] = []
        self._unfilled: set[int] = set()
        self._prompt_states: list[tuple[Tensor, Tensor]] = []
        self._completion_states: list[tuple[Tensor, Tensor]] = []
        # For each completion of the batch: slot of its prompt * G + its index in the group; tokens decoded before it.
        self._members: list[int] = []
        self._starts: list[int] = []
        self._num_decoded = 0
        # Rows that admissions may use: no fewer are kept in memory.
        self._num_rows = self.max_rows = len(prompt_lengths) * num_generations
        self._room = min(FIRST_ROOM, max_length)
        # Times that memory was allocated: what was captured before must not be replayed.
        self._num_allocations = 0
        # Rows of: tokens stored; tokens of the prompt; member of the batch, beyond all members for unused rows; the
        # same, but the last member for unused rows.
        self._table_4R = torch.zeros(4, self.max_rows, dtype=torch.long, device=device)
        self.admit(prompt_lengths)

    def close(self) -> None:
        """Allow no more admissions: the memory of completions that have ended is not kept when the others grow."""
        self._num_rows = 0

    def admit(self, prompt_lengths: Sequence[int]) -> None:
        """Add groups at the end of the batch. The next call of the model is that of their prompts, in `prompts`.

        The batch never has more completions than at first.
        """
        used = {member // self._num_generations for member in self._members}
        free = [slot for slot in range(len(self._prompt_lengths)) if slot not in used]
        self._new_slots = []
        for length in prompt_lengths:
            slot = free.pop(0) if free else len(self._prompt_lengths)
            self._prompt_lengths[slot : slot + 1] = [length]
            self._new_slots.append(slot)
            self._members += range(slot * self._num_generations, (slot + 1) * self._num_generations)
            self._starts += [self._num_decoded] * self._num_generations
        self.prompts = PackedGroups([(length, []) for length in prompt_lengths], self._device)
        self._unfilled = set(range(len(self._prompt_states)))
        self._grow_prompts()
        lengths = send(self._prompt_lengths, self._device)
        is_padding = torch.arange(self._prompt_room[1], device=self._device) >= lengths[:, None]
        self._prompt_mask[: len(lengths)] = torch.zeros_like(is_padding, dtype=torch.float32).masked_fill_(
            is_padding, -torch.inf
        )
        self._index_batch()

    def _grow_prompts(self) -> None:
        """Allocate more memory for prompts where the slots are too few or too short."""
        old, slots, longest = self._prompt_room, len(self._prompt_lengths), max(self._prompt_lengths)
        self._prompt_room = max(old[0], slots), max(old[1], longest)
        if not self._prompt_states or self._prompt_room != old:
            self._prompt_mask = torch.zeros(self._prompt_room, device=self._device)
        if self._prompt_room != old:
            more = (0, 0, 0, self._prompt_room[1] - old[1], 0, 0, 0, self._prompt_room[0] - old[0])
            for layer, (keys, values) in enumerate(self._prompt_states):
                self._prompt_states[layer] = nn.functional.pad(keys, more), nn.functional.pad(values, more)
            self._num_allocations += 1

    def _index_batch(self) -> None:
        """Send what changes with the batch to the device: nothing of it is sent for a token."""
        round_up = bucket if self._is_static else int
        num_prompts = min(round_up(len(self._prompt_lengths)), self._prompt_room[0])
        self._prompt_shape = num_prompts, min(round_up(max(self._prompt_lengths)), self._prompt_room[1])
        self.num_rows = min(round_up(len(self._members)), self.max_rows)
        unused, all_members = self.max_rows - len(self._members), num_prompts * self._num_generations
        prompt_lengths = [self._prompt_lengths[member // self._num_generations] for member in self._members]
        columns = [self.lengths, prompt_lengths, self._members, self._members]
        beyond = [0, 0, all_members, all_members - 1]
        table = [[*column, *[value] * unused] for column, value in zip(columns, beyond, strict=True)]
        self._table_4R.copy_(send(table, self._device))
        self._is_whole = self._members == list(range(all_members))
        self._is_even = not self._is_static and len(set(self._starts)) <= 1

    @property
    def position_ids(self) -> Tensor:
        """Position of the next token of each row, [R, 1]."""
        return self._table_4R[:2, : self.num_rows].sum(dim=0)[:, None]

    @property
    def lengths_R(self) -> Tensor:  # noqa: N802  # a shape
        """Tokens of each row that are stored or that the model runs on, on the device."""
        return self._table_4R[0, : self.num_rows]

    @property
    def members_R(self) -> Tensor:  # noqa: N802  # a shape
        """Slot of the prompt * G + index in the group of each row, on the device; any for unused rows."""
        return self._table_4R[3, : self.num_rows]

    @property
    def new_members(self) -> list[int]:
        """Members of the groups that were admitted last."""
        G = self._num_generations
        return [slot * G + index for slot in self._new_slots for index in range(G)]

    @property
    def shape(self) -> tuple[object, ...]:
        """Return all that a call with one token per completion depends on, except for the content of tensors."""
        tokens = self._num_tokens
        return self._num_allocations, self.num_rows, tokens, self._prompt_shape, self._is_whole, self._is_even

    @property
    def num_groups(self) -> int:
        """Number of groups with a live completion."""
        return len({member // self._num_generations for member in self._members})

    @property
    def lengths(self) -> list[int]:
        """Tokens of each live completion that are stored."""
        return [self._num_decoded - start for start in self._starts]

    @property
    def _length(self) -> int:
        """Tokens of the longest live completion."""
        return self._num_decoded - min(self._starts)

    @property
    def _num_tokens(self) -> int:
        """Tokens per completion that the next call reads, the new one included."""
        tokens = self._length + 1
        return min(max(bucket(tokens), FIRST_ROOM), self._room) if self._is_static else tokens

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Store the keys and values of the call, then attend to all that are stored for the same text."""
        is_first = layer == len(self._prompt_states)
        if is_first:
            shape = (self._prompt_room[0], key.shape[1], self._prompt_room[1], key.shape[3])
            self._prompt_states.append((key.new_zeros(shape), value.new_zeros(shape)))
        if is_first or layer in self._unfilled:
            self._unfilled.discard(layer)
            self._store_prompts(layer, key, value)
            return self.prompts.attend(layer, query, key, value, scaling)
        if layer == 0:
            self._begin_token(query.dtype)
        return self._attend_live(layer, query[:, :, 0] * scaling, key[:, :, 0], value[:, :, 0])[:, None]

    def advance(self) -> None:
        """Count the new token, after every layer has stored its states."""
        self._num_decoded += 1

    def keep(self, live: Sequence[int]) -> list[int]:
        """Drop all completions but those at the batch indices `live` (ascending).

        Return the old index of each completion of the new batch: of 5 completions, keep([1, 3, 4]) -> [3, 1, 4].
        """
        order = list(live)
        holes = sorted(set(range(len(order))) - set(order))
        # Completions beyond the new end move into the holes that ended ones left; the others stay where they are.
        moved = [index for index in order if index >= len(order)]
        order = list(range(len(order)))
        length = self._length
        for hole, index in zip(holes, moved, strict=True):
            order[hole] = index
            for keys, values in self._completion_states:
                keys[hole, :, :length] = keys[index, :, :length]
                values[hole, :, :length] = values[index, :, :length]
        self._members = [self._members[index] for index in order]
        self._starts = [self._starts[index] for index in order]
        self._index_batch()
        return order

    def reserve(self) -> None:
        """Allocate memory for one more token of each completion, where there is none left."""
        length = self._length
        if length < self._room:
            return
        self._room = min(2 * length, self._max_length)
        num_rows = max(self.num_rows, self._num_rows)
        for layer, states in enumerate(self._completion_states):
            keys, values = (nn.functional.pad(each[:num_rows], (0, 0, 0, self._room - length)) for each in states)
            self._completion_states[layer] = keys, values
        self._num_allocations += 1

    def _store_prompts(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Put the new prompts' keys and values, [1, K, all tokens, D], into their slots."""
        lengths = [self._prompt_lengths[slot] for slot in self._new_slots]
        for stored, states in zip(self._prompt_states[layer], (key, value), strict=True):
            for slot, length, chunk in zip(self._new_slots, lengths, states[0].split(lengths, dim=1), strict=True):
                stored[slot, :, :length] = chunk

    def _begin_token(self, dtype: torch.dtype) -> None:
        """Compute what all layers need for the new tokens: the mask, and the rows' indices; count the tokens."""
        self.reserve()
        P, L = self._prompt_shape
        self._rows_R = torch.arange(self.num_rows, device=self._device)
        self._own_R = self.lengths_R.clone()
        is_later_RT = torch.arange(self._num_tokens, device=self._device) > self._own_R[:, None]
        own_mask_RT = torch.zeros_like(is_later_RT, dtype=torch.float32).masked_fill_(is_later_RT, -torch.inf)
        prompt_mask_RL = self._prompt_mask[:P, :L].index_select(0, self.members_R // self._num_generations)
        self._mask = torch.cat([prompt_mask_RL, own_mask_RT], dim=1)[:, None, None].to(dtype)
        self._table_4R[0] += 1

    def _attend_live(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend with query [R, H, D], key and value [R, K, D] -> [R, H, D]; heads that share keys are one product."""
        (R, H, D), K = query.shape, key.shape[1]
        if layer == len(self._completion_states):
            shape = (max(R, self._num_rows), K, self._room, D)
            self._completion_states.append((key.new_zeros(shape), value.new_zeros(shape)))
        keys, values = self._completion_states[layer]
        if self._is_even:
            keys[:R, :, self._length], values[:R, :, self._length] = key, value
        else:
            keys[self._rows_R, :, self._own_R], values[self._rows_R, :, self._own_R] = key, value
        keys, values = keys[:R, :, : self._num_tokens], values[:R, :, : self._num_tokens]
        P, L = self._prompt_shape
        prompt_keys, prompt_values = (states[:P, :, :L] for states in self._prompt_states[layer])

        query = query.reshape(R, K, H // K, D)
        prompt_scores = self._by_completion(self._by_prompt(query) @ prompt_keys.transpose(2, 3))
        scores = torch.cat([prompt_scores, query @ keys.transpose(2, 3)], dim=3).add_(self._mask)
        weights = torch.softmax(scores, dim=3, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
        from_prompt = self._by_completion(self._by_prompt(weights[..., :L]) @ prompt_values)
        return (from_prompt + weights[..., L:] @ values).reshape(R, H, D)

    def _by_prompt(self, states: Tensor) -> Tensor:
        """Collect rows [R, K, h, X] by prompt, with zeros for completions that ended -> [P, K, G * h, X]."""
        P, G = self._prompt_shape[0], self._num_generations
        if not self._is_whole:
            # Unused rows go to one beyond all members.
            collected = states.new_zeros(P * G + 1, *states.shape[1:])
            states = collected.index_copy_(0, self._table_4R[2, : self.num_rows], states)[:-1]
        return states.view(P, G, *states.shape[1:]).transpose(1, 2).flatten(2, 3)

    def _by_completion(self, states: Tensor) -> Tensor:
        """Invert `_by_prompt`, [P, K, G * h, X] -> [R, K, h, X]."""
        states = states.unflatten(2, (self._num_generations, -1)).transpose(1, 2).flatten(0, 1)
        return states if self._is_whole else states.index_select(0, self.members_R)
