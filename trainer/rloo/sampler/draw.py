"""One token a row from logits, by one uniform number a row: the inverse of the cumulative distribution.

Shapes: R rows, V tokens of the tokenizer, B blocks of them.
"""

import torch
from torch import Tensor

# Running sums are kept by block: only the block that holds the token is looked at token by token.
BLOCK = 256
# A filter that would cut between two tokens nearer than this in log-probability keeps both: whoever scores the draw
# again has other rounding and must find the same tokens above the cutoff.
TIE = 1e-5


def draw(
    logits_RV: Tensor, uniforms_R: Tensor, temperature: float, top_p: float = 1.0, top_k: int | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Draw at uniforms in [0, 1) -> ids [R], their log-probabilities [R], cutoffs [R].

    Temperature 0 takes the most likely token; its log-probability is then the one at temperature 1. With top_k only the
    k likeliest tokens can be drawn, with top_p then only the likeliest of these that reach that probability together;
    their log-probabilities are among each other. Tokens as likely as the last one stay too. The cutoff lies between the
    last of them and the first that is left out, and is told from the drawn token: log p of a token that could be drawn
    is at least that of the drawn one plus the cutoff, over all tokens or over those alone. Without a filter it is None.
    """
    scaled_RV = logits_RV.float() if temperature in (0, 1) else logits_RV.float() / temperature
    cutoffs_R = None
    if top_p < 1 or top_k is not None:
        cutoffs_R = _cutoffs(scaled_RV, top_p, top_k)
        scaled_RV = scaled_RV.masked_fill(scaled_RV < cutoffs_R[:, None], -torch.inf)
    probabilities_RV = scaled_RV.softmax(dim=1)
    ids_R1 = scaled_RV.argmax(dim=1, keepdim=True) if temperature == 0 else _invert(probabilities_RV, uniforms_R)
    if cutoffs_R is not None:
        cutoffs_R = cutoffs_R - scaled_RV.gather(1, ids_R1)[:, 0]
    return ids_R1[:, 0], probabilities_RV.gather(1, ids_R1)[:, 0].log(), cutoffs_R


def _invert(probabilities_RV: Tensor, uniforms_R: Tensor) -> Tensor:
    """The first token whose running sum exceeds its row's uniform share of the total -> [R, 1]."""
    num_tokens = probabilities_RV.shape[1]
    in_whole_blocks = num_tokens - num_tokens % BLOCK
    sums_RB = probabilities_RV[:, :in_whole_blocks].unflatten(1, (-1, BLOCK)).sum(dim=2)
    if in_whole_blocks < num_tokens:
        sums_RB = torch.cat([sums_RB, probabilities_RV[:, in_whole_blocks:].sum(dim=1, keepdim=True)], dim=1)
    # In float64: the tail of a large vocabulary is lost in a float32 running sum.
    sums_RB = sums_RB.double()
    running_RB = sums_RB.cumsum(dim=1)
    targets_R1 = uniforms_R.double()[:, None] * running_RB[:, -1:]
    block_R1 = torch.searchsorted(running_RB, targets_R1, right=True).clamp(max=sums_RB.shape[1] - 1)
    before_R1 = running_RB.gather(1, block_R1) - sums_RB.gather(1, block_R1)
    # Behind the last token of a last, shorter block stands that token again.
    tokens_Rv = (block_R1 * BLOCK + torch.arange(BLOCK, device=block_R1.device)).clamp(max=num_tokens - 1)
    within_Rv = probabilities_RV.gather(1, tokens_Rv).double().cumsum(dim=1)
    place_R1 = torch.searchsorted(within_Rv, targets_R1 - before_R1, right=True)
    # Rounding may put the target at or behind the block's last token with a weight: that token is then the one.
    last_R1 = torch.searchsorted(within_Rv, within_Rv[:, -1:].contiguous())
    return tokens_Rv.gather(1, torch.minimum(place_R1, last_R1))


def _cutoffs(scaled_RV: Tensor, top_p: float, top_k: int | None) -> Tensor:
    """Scaled logits below which the filters leave tokens out, as vLLM and transformers do, -> [R]."""
    sorted_RV = scaled_RV.sort(dim=1, descending=True).values
    num_tokens = sorted_RV.shape[1]
    stays_RV = sorted_RV >= sorted_RV[:, min(top_k or num_tokens, num_tokens) - 1, None]
    if top_p < 1:
        shares_RV = sorted_RV.masked_fill(~stays_RV, -torch.inf).softmax(dim=1).double()
        # A token stays if those before it do not reach top_p; the likeliest always does.
        stays_RV &= shares_RV.cumsum(dim=1) - shares_RV < top_p
    last_R1 = (stays_RV.sum(dim=1, keepdim=True) - 1).clamp(min=0)
    kept_R1, dropped_R1 = sorted_RV.gather(1, last_R1), sorted_RV.gather(1, (last_R1 + 1).clamp(max=num_tokens - 1))
    between_R1 = torch.minimum((kept_R1 + dropped_R1) / 2, kept_R1 - TIE)
    cutoffs_R1 = torch.where(last_R1 == num_tokens - 1, -torch.inf, between_R1)
    return cutoffs_R1[:, 0]
