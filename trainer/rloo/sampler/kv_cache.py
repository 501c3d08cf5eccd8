"""Keys and values of a batch being sampled: a prompt's once for its group, and each live row's own, in place.

Shapes: P prompts, G completions a prompt, R live rows, L tokens of the longest prompt, N tokens that a row has,
H heads, K key-value heads, D size of a head.
"""

from collections.abc import Sequence

import torch
from rekatrain.trainer.rloo.kernels.grouped_attention import PackedGroups
from torch import Tensor

# Room for completions is made this many tokens at first and doubled when it is full.
FIRST_ROOM = 64


class ForkedCache:
    """First the layout of the prompts' call, then that of each call with one new token a live row.

    A row is known by its place in the batch; `prompt_indices` says to which prompt it belongs, so that the last row
    replaces one that ends and nothing else moves.
    """

    def __init__(self, prompt_lengths: Sequence[int], num_generations: int, max_length: int, device: torch.device):
        self.prompts = PackedGroups([(length, []) for length in prompt_lengths], device)
        self._prompt_lengths = list(prompt_lengths)
        self._num_generations = num_generations
        self._max_length = max_length
        self._slots = torch.arange(len(prompt_lengths) * num_generations, device=device)
        self._length = 0
        self._prompt_states: list[tuple[Tensor, Tensor]] = []
        self._own_states: list[tuple[Tensor, Tensor]] = []
        lengths = torch.tensor(self._prompt_lengths, device=device)
        is_padding = torch.arange(max(prompt_lengths), device=device) >= lengths[:, None]
        self._prompt_mask = torch.zeros(is_padding.shape, device=device).masked_fill_(is_padding, -torch.inf)

    @property
    def position_ids(self) -> Tensor:
        """[R, 1], of the next token of each live row."""
        lengths = torch.tensor(self._prompt_lengths, device=self._slots.device)
        return (lengths[self._slots // self._num_generations] + self._length)[:, None]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Store the call's keys and values and attend to what is there."""
        if layer == len(self._prompt_states):
            self._prompt_states.append((self._padded(key), self._padded(value)))
            return self.prompts.attend(layer, query, key, value, scaling)
        return self._attend_live(layer, query[:, :, 0] * scaling, key[:, :, 0], value[:, :, 0])[:, None]

    def advance(self) -> None:
        """Count the token that every layer has stored."""
        self._length += 1

    def keep(self, live: Sequence[int]) -> list[int]:
        """Drop all rows but those at the places `live` (ascending) -> the place each row of the batch came from."""
        order = list(live)
        holes = sorted(set(range(len(order))) - set(order))
        # Rows from behind the new end fill the holes that ended rows left; the others stay where they are.
        moved = [place for place in order if place >= len(order)]
        order = list(range(len(order)))
        for hole, place in zip(holes, moved, strict=True):
            order[hole] = place
            for keys, values in self._own_states:
                keys[hole, :, : self._length] = keys[place, :, : self._length]
                values[hole, :, : self._length] = values[place, :, : self._length]
        self._slots = self._slots[torch.tensor(order, device=self._slots.device)]
        return order

    def _padded(self, states: Tensor) -> Tensor:
        """Prompts' keys or values [1, K, all tokens, D] -> [P, K, L, D]."""
        pieces = [piece.transpose(0, 1) for piece in states[0].split(self._prompt_lengths, dim=1)]
        return torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True).transpose(1, 2).contiguous()

    def _room(self, layer: int, key: Tensor) -> tuple[Tensor, Tensor]:
        if layer == len(self._own_states):
            room = min(FIRST_ROOM, self._max_length)
            shape = (len(key), key.shape[1], room, key.shape[2])
            self._own_states.append((key.new_empty(shape), key.new_empty(shape)))
        keys, values = self._own_states[layer]
        if self._length == keys.shape[2]:
            room = min(2 * self._length, self._max_length)
            keys, values = (_grown(states[: len(key)], room) for states in (keys, values))
            self._own_states[layer] = keys, values
        return keys, values

    def _attend_live(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """query [R, H, D], key and value [R, K, D] -> [R, H, D]; heads that share keys are rows of one product."""
        (R, H, D), K = query.shape, key.shape[1]
        keys, values = self._room(layer, key)
        keys[:R, :, self._length], values[:R, :, self._length] = key, value
        keys, values = keys[:R, :, : self._length + 1], values[:R, :, : self._length + 1]
        prompt_keys, prompt_values = self._prompt_states[layer]

        query = query.reshape(R, K, H // K, D)
        own_scores = query @ keys.transpose(2, 3)
        prompt_scores = self._by_prompt(query) @ prompt_keys.transpose(2, 3)
        prompt_scores += self._prompt_mask[:, None, None].to(query.dtype)
        scores = torch.cat([self._by_row(prompt_scores), own_scores], dim=3)
        weights = torch.softmax(scores, dim=3, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
        L = prompt_keys.shape[2]
        from_prompt = self._by_row(self._by_prompt(weights[..., :L]) @ prompt_values)
        return (from_prompt + weights[..., L:] @ values).reshape(R, H, D)

    def _by_prompt(self, rows: Tensor) -> Tensor:
        """Live rows [R, K, h, X] side by side for their prompts, with gaps where rows ended -> [P, K, G * h, X]."""
        P, G = len(self._prompt_lengths), self._num_generations
        if len(rows) < P * G:
            rows = rows.new_zeros(P * G, *rows.shape[1:]).index_copy_(0, self._slots, rows)
        return rows.view(P, G, *rows.shape[1:]).transpose(1, 2).flatten(2, 3)

    def _by_row(self, prompts: Tensor) -> Tensor:
        """The inverse: [P, K, G * h, X] -> [R, K, h, X]."""
        rows = prompts.unflatten(2, (self._num_generations, -1)).transpose(1, 2).flatten(0, 1)
        return rows if len(self._slots) == len(rows) else rows[self._slots]


def _grown(states: Tensor, room: int) -> Tensor:
    larger = states.new_empty(*states.shape[:2], room, states.shape[3])
    larger[:, :, : states.shape[2]] = states
    return larger
