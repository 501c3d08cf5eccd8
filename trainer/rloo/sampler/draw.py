"""Draw tokens from logits by inverting the cumulative distribution: one uniform number per token drawn.

Shapes: N completions, V tokens of the vocabulary, B blocks of them, v tokens of one block.
"""

import torch
from torch import Tensor, nn

# Tokens per block. Running sums are kept per block; only the block that holds the drawn token is summed token by token.
BLOCK = 256
# A filter that would cut between two tokens closer than this in log-probability keeps both, and so on along a chain of
# such tokens: the trainer, whose rounding differs, must find the same tokens above the cutoff.
TIE = 1e-5


def draw(
    logits_NV: Tensor,
    uniforms_N: Tensor,
    temperature: float,
    top_p: float = 1.0,
    top_k: int | None = None,
    num_tokens: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Draw one token for each completion -> ids [N], their log-probabilities [N], cutoffs [N] or None.

    uniforms_N:  numbers in [0, 1)
    temperature: 0 takes the most likely token and gives its log-probability at temperature 1
    num_tokens:  ids below which tokens are drawn; None: all

    Apply top-k, then top-p, and renormalize over the kept tokens. Ties with the last kept token are kept (TIE).

    The cutoff is the log-prob of the least likely kept token minus that of the drawn token, rounded down: it lies
    between the last kept and the first dropped token, and is at most 0. A token was kept if its log-prob is at least
    the drawn token's plus the cutoff, so the trainer can rebuild the kept set. None where no filter is on.
    """
    logits_NV = logits_NV[:, :num_tokens]
    scaled_NV = logits_NV.float() if temperature in (0, 1) else logits_NV.float() / temperature
    cutoffs_N = None
    if top_p < 1 or top_k is not None:
        cutoffs_N = _cutoffs(scaled_NV, top_p, top_k)
        scaled_NV = scaled_NV.masked_fill(scaled_NV < cutoffs_N[:, None], -torch.inf)
    probabilities_NV = scaled_NV.softmax(dim=1)
    ids_N1 = scaled_NV.argmax(dim=1, keepdim=True) if temperature == 0 else _invert(probabilities_NV, uniforms_N)
    if cutoffs_N is not None:
        cutoffs_N = cutoffs_N - scaled_NV.gather(1, ids_N1)[:, 0]
    return ids_N1[:, 0], probabilities_NV.gather(1, ids_N1)[:, 0].log(), cutoffs_N


def _invert(probabilities_NV: Tensor, uniforms_N: Tensor) -> Tensor:
    """Return the first token whose running sum exceeds the uniform number times the total -> [N, 1]."""
    num_tokens = probabilities_NV.shape[1]
    in_whole_blocks = num_tokens - num_tokens % BLOCK
    sums_NB = probabilities_NV[:, :in_whole_blocks].unflatten(1, (-1, BLOCK)).sum(dim=2)
    if in_whole_blocks < num_tokens:
        sums_NB = torch.cat([sums_NB, probabilities_NV[:, in_whole_blocks:].sum(dim=1, keepdim=True)], dim=1)
    # In float64: a float32 running sum loses the tail of a large vocabulary.
    sums_NB = sums_NB.double()
    running_NB = _running_sums(sums_NB)
    targets_N1 = uniforms_N.double()[:, None] * running_NB[:, -1:]
    block_N1 = torch.searchsorted(running_NB, targets_N1, right=True).clamp(max=sums_NB.shape[1] - 1)
    before_N1 = running_NB.gather(1, block_N1) - sums_NB.gather(1, block_N1)
    # A shorter last block is padded with its last token.
    tokens_Nv = (block_N1 * BLOCK + torch.arange(BLOCK, device=block_N1.device)).clamp(max=num_tokens - 1)
    within_Nv = _running_sums(probabilities_NV.gather(1, tokens_Nv).double())
    index_N1 = torch.searchsorted(within_Nv, targets_N1 - before_N1, right=True)
    # Rounding may put the target at or after the block's last token with a probability above 0: then draw that token.
    last_N1 = torch.searchsorted(within_Nv, within_Nv[:, -1:].contiguous())
    return tokens_Nv.gather(1, torch.minimum(index_N1, last_N1))


def _running_sums(values_NX: Tensor) -> Tensor:
    """Return the running sums of each row of float64 values."""
    if values_NX.is_cuda and torch.are_deterministic_algorithms_enabled():
        return running_sums_by_products(values_NX)
    return values_NX.cumsum(dim=1)


def running_sums_by_products(values_NX: Tensor) -> Tensor:
    """Return the running sums of each row by matrix products, which are deterministic on a GPU; `cumsum` is not there.

    Sums within blocks, plus the sums of the blocks before.
    """
    num_values = values_NX.shape[1]
    blocks_NBv = nn.functional.pad(values_NX, (0, -num_values % BLOCK)).unflatten(1, (-1, BLOCK))
    num_blocks = blocks_NBv.shape[1]
    up_to = torch.ones(max(BLOCK, num_blocks), max(BLOCK, num_blocks), dtype=values_NX.dtype, device=values_NX.device)
    within_NBv = blocks_NBv @ up_to[:BLOCK, :BLOCK].triu()
    before_NB = within_NBv[:, :, -1] @ up_to[:num_blocks, :num_blocks].triu(1)
    return (within_NBv + before_NB[:, :, None]).flatten(1)[:, :num_values]


def _cutoffs(scaled_NV: Tensor, top_p: float, top_k: int | None) -> Tensor:
    """Return the scaled logits below which top-k and top-p drop tokens, as in vLLM and transformers -> [N]."""
    sorted_NV = scaled_NV.sort(dim=1, descending=True).values
    num_tokens = sorted_NV.shape[1]
    is_kept_NV = sorted_NV >= sorted_NV[:, min(top_k or num_tokens, num_tokens) - 1, None]
    if top_p < 1:
        fractions_NV = sorted_NV.masked_fill(~is_kept_NV, -torch.inf).softmax(dim=1).double()
        # Keep a token if the more likely ones do not reach top_p; the most likely token is always kept.
        is_kept_NV &= _running_sums(fractions_NV) - fractions_NV < top_p
    # Keep on until a token is less likely by TIE, and cut halfway to it: rounding moves no token across the cutoff.
    next_NV = nn.functional.pad(sorted_NV[:, 1:], (0, 1), value=-torch.inf)
    indices_V = torch.arange(num_tokens, device=sorted_NV.device)
    is_end_NV = (sorted_NV - next_NV >= TIE) & (indices_V >= is_kept_NV.sum(dim=1, keepdim=True) - 1)
    end_N1 = torch.where(is_end_NV, indices_V, num_tokens - 1).amin(dim=1, keepdim=True)
    return ((sorted_NV.gather(1, end_N1) + next_NV.gather(1, end_N1)) / 2)[:, 0]
