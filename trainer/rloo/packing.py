"""Which completions share a micro-batch, and whether a group's prompt is run once or with each of its completions.

Lengths are those of the tokens that a model is run on: a prompt's, and a completion's less its last token.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

# Multiplications in the time that one element of a head's output takes to be put together from two parts, on a CPU:
# measured as 1.8 ns, forward and backward, beside products of 110 thousand million multiplications a second.
JOIN = 64.0


@dataclass(frozen=True, kw_only=True)
class PassCost:
    """Cost of one forward pass, in multiplications.

    token: for each token, in the linear layers
    pair:  for each query and key that are multiplied, over all layers
    join:  for each completion token that runs apart from its prompt, where attention puts the two together
    """

    token: float
    pair: float
    join: float

    @classmethod
    def of(cls, decoder: PreTrainedModel) -> "PassCost":
        """The cost of a decoder, adapters included."""
        config = decoder.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = config.num_hidden_layers * config.num_attention_heads * head_dim
        return cls(
            # By shape: a weight that ZeRO-3 has sharded is empty between its passes, one of four bits is packed.
            token=float(sum(m.in_features * m.out_features for m in decoder.modules() if isinstance(m, nn.Linear))),
            pair=2.0 * width,
            # A GPU's kernel has the prompt's keys and the completion's in one loop.
            join=0.0 if decoder.device.type == "cuda" else JOIN * width,
        )

    def shares_prompt(self, prompt: int, completions: Sequence[int]) -> bool:
        """Whether a prompt run once for its completions costs less than one run with each.

        >>> cost = PassCost(token=100.0, pair=1.0, join=10.0)
        >>> cost.shares_prompt(50, [10, 10]), cost.shares_prompt(1, [1000, 1000])
        (True, False)
        """
        # A prompt run again costs its tokens and what they see of each other; all else is the same either way.
        again = (len(completions) - 1) * (self.token * prompt + self.pair * prompt**2 / 2)
        return self.join * sum(completions) <= again

    def longest_shared(self, prompt: int, num_completions: int, max_length: int) -> int:
        """The length up to which equally long completions share their prompt, at most `max_length`.

        >>> PassCost(token=100.0, pair=1.0, join=10.0).longest_shared(50, 2, 1000)
        312
        """
        lengths = range(1, max_length + 1)
        return bisect_left(lengths, True, key=lambda own: not self.shares_prompt(prompt, [own] * num_completions))

    def describe(self, prompt: int, num_completions: int, max_length: int) -> str:
        """The choice in words, for a usual prompt."""
        longest = self.longest_shared(prompt, num_completions, max_length)
        beyond = "" if longest == max_length else ", and with each of them above"
        return f"a prompt of {prompt} tokens is run once for {num_completions} completions of up to {longest}{beyond}"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Completions of one group that are run together: all of them, unless the group is above the budget.

    group:      the group's place
    members:    places of the completions in it
    is_shared:  whether its prompt is run once for them
    """

    group: int
    members: range
    is_shared: bool


def num_tokens(prompt: int, completions: Sequence[int], is_shared: bool) -> int:
    """Tokens that a piece is run on."""
    return sum(completions) + prompt * (1 if is_shared else len(completions))


def pack(groups: Sequence[tuple[int, Sequence[int]]], budget: int, cost: PassCost) -> list[list[Piece]]:
    """Put groups together, in order, into micro-batches of at most `budget` tokens.

    groups: for each, its prompt's length and its completions'. A group above the budget is cut into pieces within it;
    a single row above it is a micro-batch of its own.

    >>> cost = PassCost(token=1.0, pair=0.0, join=0.0)
    >>> [[(piece.group, list(piece.members)) for piece in batch] for batch in pack([(2, [3, 3]), (1, [9, 4])], 9, cost)]
    [[(0, [0, 1])], [(1, [0])], [(1, [1])]]
    """
    batches: list[list[Piece]] = []
    room = 0
    for place, (prompt, completions) in enumerate(groups):
        is_shared = cost.shares_prompt(prompt, completions)
        first = 0
        while first < len(completions):
            end = len(completions)
            while end > first + 1 and num_tokens(prompt, completions[first:end], is_shared) > budget:
                end -= 1
            needed = num_tokens(prompt, completions[first:end], is_shared)
            if needed > room or not batches:
                batches.append([])
                room = budget
            batches[-1].append(Piece(group=place, members=range(first, end), is_shared=is_shared))
            room -= needed
            first = end
    return batches
