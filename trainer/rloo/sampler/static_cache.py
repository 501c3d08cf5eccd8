"""The key-value cache of a batch as a GPU samples it: memory at fixed addresses, which CUDA graphs need.

A call with one token per completion reads and writes the same memory each time, and what differs from token to token
lies in tensors on the device: `shape` names all else, so a CUDA graph of the call can be replayed while it stays equal.
Shapes are rounded up (`bucket`), so that few of them occur; rows and tokens beyond are masked or dropped.

Shapes: H heads, K key-value heads, h = H / K heads that share one, D size of a head; P slots of prompts, G completions
per prompt, N completions that have not ended yet, R >= N rows of a call, L tokens per prompt and T per completion.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rekatrain.trainer.rloo.kernels.grouped_attention import FIRST_ROOM, ForkedCache


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


class StaticCache(ForkedCache):
    """A `ForkedCache` whose memory keeps its addresses from token to token."""

    def __init__(
        self,
        prompt_lengths: Sequence[int],
        num_generations: int,
        max_length: int,
        device: torch.device,
        *,
        max_prompts: int = 0,
        longest_prompt: int = 0,
    ) -> None:
        """Admit the first groups.

        max_prompts:    prompts for which there is room; more of them, or longer ones, take new memory
        longest_prompt: tokens of a prompt for which there is room
        """
        self.max_rows = len(prompt_lengths) * num_generations
        self._prompt_room = max(max_prompts, len(prompt_lengths)), max(longest_prompt, *prompt_lengths)
        self._prompt_mask = torch.zeros(self._prompt_room, device=device)
        self._own_room = min(FIRST_ROOM, max_length)
        # Times that memory was allocated: what was captured before must not be replayed.
        self._num_allocations = 0
        # Rows of: tokens stored; tokens of the prompt; member of the batch, beyond all members for unused rows; the
        # same, but the last member for unused rows.
        self._table_4R = torch.zeros(4, self.max_rows, dtype=torch.long, device=device)
        super().__init__(prompt_lengths, num_generations, max_length, device)

    def _index_prompts(self) -> None:
        """Write the mask of the prompts; allocate more memory where the slots are too few or too short."""
        old, slots, longest = self._prompt_room, len(self._prompt_lengths), max(self._prompt_lengths)
        self._prompt_room = max(old[0], slots), max(old[1], longest)
        if self._prompt_room != old:
            self._prompt_mask = torch.zeros(self._prompt_room, device=self._device)
            more = (0, 0, 0, self._prompt_room[1] - old[1], 0, 0, 0, self._prompt_room[0] - old[0])
            for layer, (keys, values) in self._prompt_states.items():
                self._prompt_states[layer] = nn.functional.pad(keys, more), nn.functional.pad(values, more)
            self._num_allocations += 1
        lengths = send(self._prompt_lengths, self._device)
        is_padding = torch.arange(self._prompt_room[1], device=self._device) >= lengths[:, None]
        self._prompt_mask[: len(lengths)] = torch.zeros_like(is_padding, dtype=torch.float32).masked_fill_(
            is_padding, -torch.inf
        )

    def _index_batch(self) -> None:
        num_prompts = min(bucket(len(self._prompt_lengths)), self._prompt_room[0])
        self._prompt_shape = num_prompts, min(bucket(max(self._prompt_lengths)), self._prompt_room[1])
        self.num_rows = min(bucket(len(self._members)), self.max_rows)
        unused, all_members = self.max_rows - len(self._members), num_prompts * self._num_generations
        prompt_lengths = [self._prompt_lengths[member // self._num_generations] for member in self._members]
        columns = [self.lengths, prompt_lengths, self._members, self._members]
        beyond = [0, 0, all_members, all_members - 1]
        table = [[*column, *[value] * unused] for column, value in zip(columns, beyond, strict=True)]
        self._table_4R.copy_(send(table, self._device))
        self._is_whole = self._members == list(range(all_members))
        # Views: the step counts tokens on the device.
        self.lengths_N, self.members_N = self._table_4R[0, : self.num_rows], self._table_4R[3, : self.num_rows]

    @property
    def position_ids(self) -> Tensor:
        """Position of the next token of each row, [R, 1]."""
        return self._table_4R[:2, : self.num_rows].sum(dim=0)[:, None]

    @property
    def shape(self) -> tuple[object, ...]:
        """Return all that a call with one token per completion depends on, except for the content of tensors."""
        return self._num_allocations, self.num_rows, self._num_tokens, self._prompt_shape, self._is_whole

    @property
    def _num_tokens(self) -> int:
        """Tokens per completion that the next call reads, the new one included."""
        return min(max(bucket(self._length + 1), FIRST_ROOM), self._own_room)

    def advance(self) -> None:
        """Count the new token, after every layer has stored its states; the step has counted it on the device."""
        self._num_decoded += 1

    def reserve(self) -> None:
        """Allocate memory for one more token of each completion, where there is none left."""
        length = self._length
        if length < self._own_room:
            return
        self._own_room = min(2 * length, self._max_length)
        num_rows = max(self.num_rows, self._num_rows)
        for layer, states in enumerate(self._completion_states):
            keys, values = (nn.functional.pad(each[:num_rows], (0, 0, 0, self._own_room - length)) for each in states)
            self._completion_states[layer] = keys, values
        self._num_allocations += 1

    def _with_new_prompts(self, old: Tensor | None, states: Tensor) -> Tensor:
        if old is None:
            old = states.new_zeros(self._prompt_room[0], states.shape[1], self._prompt_room[1], states.shape[3])
        lengths = [self._prompt_lengths[slot] for slot in self._new_slots]
        for slot, length, chunk in zip(self._new_slots, lengths, states[0].split(lengths, dim=1), strict=True):
            old[slot, :, :length] = chunk
        return old

    def _begin_token(self, dtype: torch.dtype) -> None:
        """Compute what all layers need for the new tokens: the mask, and the rows' indices; count the tokens."""
        self.reserve()
        P, L = self._prompt_shape
        self._rows_R = torch.arange(self.num_rows, device=self._device)
        self._own_R = self.lengths_N.clone()
        is_later_RT = torch.arange(self._num_tokens, device=self._device) > self._own_R[:, None]
        own_mask_RT = torch.zeros_like(is_later_RT, dtype=torch.float32).masked_fill_(is_later_RT, -torch.inf)
        prompt_mask_RL = self._prompt_mask[:P, :L].index_select(0, self.members_N // self._num_generations)
        self._mask = torch.cat([prompt_mask_RL, own_mask_RT], dim=1)[:, None, None].to(dtype)
        self._table_4R[0] += 1

    def _attend_live(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend with query [R, H, D], key and value [R, K, D] -> [R, H, D]; heads that share keys are one product."""
        if layer == 0:
            self._begin_token(query.dtype)
        (R, H, D), K = query.shape, key.shape[1]
        if layer == len(self._completion_states):
            shape = (max(R, self._num_rows), K, self._own_room, D)
            self._completion_states.append((key.new_zeros(shape), value.new_zeros(shape)))
        keys, values = self._completion_states[layer]
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
        return states if self._is_whole else states.index_select(0, self.members_N)
