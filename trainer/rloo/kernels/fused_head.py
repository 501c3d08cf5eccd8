"""The LM head and the log-probabilities of given tokens in one function of TRL: `rloo.fused_lm_head`.

TRL's SFT trainer computes its loss by the same function. It multiplies 4,096 tokens by 32,768 rows of the head at a
time, so that logits of the whole vocabulary never exist, works on each tile in one pass (a Triton kernel on a GPU), and
adds the gradients of hidden states and weight up in float32. `TokenLogprobs`, the default, has 1 - p of a sure token
to a rounding of its dtype; here p comes from a float32 log-probability, whose error is about 1e-6.
"""

import re
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from rekatrain.data.errors import InputError
from rekatrain.trainer.models.load import Policy
from rekatrain.trainer.rloo.kernels.float32_head import Float32Linear
from rekatrain.trainer.rloo.kernels.grouped_attention import decoder_and_head

# Rows of the head that are multiplied at a time: TRL's own number.
ROWS_PER_TILE = 32768
HEAD = "lm_head"  # the layer's name in the models that are trained here


def fused_logprobs(
    head: nn.Linear, hidden_TD: Tensor, targets_T: Tensor, *, temperature: float, num_tokens: int
) -> Tensor:
    """Return log softmax(head(hidden) / temperature)[target] over the first `num_tokens` ids -> [T], float32.

    T may be 0.
    """
    # Importing TRL takes seconds, which a run without the key should not spend.
    from trl.kernels import ChunkedLogProbFunction

    device = hidden_TD.device
    arithmetic: Any = nullcontext()
    if isinstance(head, Float32Linear):
        hidden_TD, arithmetic = hidden_TD.float(), torch.autocast(device.type, enabled=False)
    with arithmetic:
        num_rows = head.weight.shape[0]
        bias: Tensor | None = head.bias
        if num_tokens < num_rows:  # ids of padding rows have probability 0
            allowed = torch.zeros(num_tokens, device=device) if bias is None else bias[:num_tokens]
            bias = torch.cat([allowed, allowed.new_full((num_rows - num_tokens,), -torch.inf)])
        logprobs_T, *_ = ChunkedLogProbFunction.apply(
            hidden_TD, head.weight, bias, targets_T, temperature, min(num_rows, ROWS_PER_TILE), None, 1.0, ()
        )
    return cast(Tensor, logprobs_T)


def check_head_targets(lora: dict[str, Any]) -> None:
    """Raise InputError if a section `lora:` puts an adapter on the LM head, or trains a copy of it."""
    for key in ("target_modules", "modules_to_save", "target_parameters"):
        names = lora.get(key) or []
        listed = [names] if isinstance(names, str) else names
        for name in listed:
            is_head = name in (HEAD, f"{HEAD}.weight") or (isinstance(names, str) and re.fullmatch(name, HEAD))
            if is_head:
                raise InputError(
                    f"rloo.fused_lm_head reads the weight of the LM head, without the adapter that lora.{key} {name!r} "
                    "puts there: set it to false, or leave the head out"
                )


def check_head(policy: Policy) -> None:
    """Raise InputError if the LM head of a loaded policy is not one plain linear layer."""
    _, head = decoder_and_head(policy)
    if type(head) not in (nn.Linear, Float32Linear):
        raise InputError(
            f"rloo.fused_lm_head reads the weight of a plain linear layer, and the LM head is a {type(head).__name__}: "
            "set it to false"
        )
