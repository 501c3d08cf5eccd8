"""The cost rule of a CPU: is a prompt run once for its group, or once with each completion?

Lengths are those of the tokens that the model is run on: a prompt's, and a completion's without its last token.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

# Cost of merging one attention output element from its prompt part and its completion part, in multiply-adds.
# Measured on one CPU: 1.8 ns, forward and backward, at 110 billion multiply-adds per second.
JOIN = 64.0


@dataclass(frozen=True, kw_only=True)
class PassCost:
    """Cost of one forward pass, in multiply-adds.

    token: per token, in the linear layers
    pair:  per pair of a query and a key, over all layers
    join:  per completion token that is run apart from its prompt: attention merges the two parts
    """

    token: float
    pair: float
    join: float

    @classmethod
    def of(cls, decoder: PreTrainedModel) -> "PassCost":
        """Return the cost of a decoder, adapters included."""
        config = decoder.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        width = config.num_hidden_layers * config.num_attention_heads * head_dim
        return cls(
            # By the layer's sizes: a weight sharded by ZeRO-3 is empty between passes, a 4-bit weight is packed.
            token=float(sum(m.in_features * m.out_features for m in decoder.modules() if isinstance(m, nn.Linear))),
            pair=2.0 * width,
            # On a GPU one kernel reads the keys of the prompt and of the completion: nothing is merged.
            join=0.0 if decoder.device.type == "cuda" else JOIN * width,
        )

    def shares_prompt(self, prompt: int, completions: Sequence[int]) -> bool:
        """Return True where running a prompt once for all its completions costs less than with each.

        >>> cost = PassCost(token=100.0, pair=1.0, join=10.0)
        >>> cost.shares_prompt(50, [10, 10]), cost.shares_prompt(1, [1000, 1000])
        (True, False)
        """
        # Running the prompt again costs its tokens and their attention to each other; the rest is the same either way.
        again = (len(completions) - 1) * (self.token * prompt + self.pair * prompt**2 / 2)
        return self.join * sum(completions) <= again

    def longest_shared(self, prompt: int, num_completions: int, max_length: int) -> int:
        """Length up to which completions of equal length share their prompt, at most `max_length` tokens.

        >>> PassCost(token=100.0, pair=1.0, join=10.0).longest_shared(50, 2, 1000)
        312
        """
        lengths = range(1, max_length + 1)
        return bisect_left(lengths, True, key=lambda own: not self.shares_prompt(prompt, [own] * num_completions))

    def describe(self, prompt: int, num_completions: int, max_length: int) -> str:
        """Describe the choice for a prompt of this length, for the log."""
        longest = self.longest_shared(prompt, num_completions, max_length)
        beyond = "" if longest == max_length else ", and with each of them above"
        return f"a prompt of {prompt} tokens is run once for {num_completions} completions of up to {longest}{beyond}"
