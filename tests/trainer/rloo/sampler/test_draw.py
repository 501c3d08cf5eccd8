"""`draw` inverts the exact distribution of the policy, or of its kept tokens, by one uniform number per token."""

import math

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from rekatrain.trainer.rloo.sampler.draw import draw


def grid(num_points: int) -> torch.Tensor:
    """Return the middles of `num_points` equal parts of [0, 1)."""
    return (torch.arange(num_points, dtype=torch.float64) + 0.5) / num_points


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draw_gives_each_token_its_probability_of_the_uniforms(temperature: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(60) * 3
    num_points = 20_000
    ids, logprobs, cutoffs = draw(logits.expand(num_points, -1), grid(num_points), temperature)

    probabilities = torch.softmax(logits.double() / temperature, dim=0)
    counts = torch.bincount(ids, minlength=len(logits))
    assert (counts - num_points * probabilities).abs().max() <= 1.01
    torch.testing.assert_close(logprobs.double(), probabilities.log()[ids], rtol=0, atol=1e-5)
    assert torch.equal(ids, ids.sort().values)


def test_draw_uses_the_logits_of_each_completion() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0], [0.0, 0.0]])
    ids, logprobs, cutoffs = draw(logits, torch.tensor([0.6, 0.6, 0.4]), 1.0)
    assert ids.tolist() == [1, 0, 0]
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.5, 0.75, 0.5]))


def test_draw_never_gives_a_token_without_probability() -> None:
    torch.manual_seed(0)
    logits = torch.randn(200, 12)
    forbidden = [0, 1, 5, 10, 11]
    logits[:, forbidden] = -math.inf
    edges = [0.0, 2.0**-53, 0.5, 1 - 2.0**-53]  # numpy's uniforms are the multiples of 2^-53 below 1
    for uniform in edges:
        ids, logprobs, cutoffs = draw(logits, torch.full((200,), uniform, dtype=torch.float64), 1.0)
        assert not set(ids.tolist()) & set(forbidden)
        assert logprobs.isfinite().all()


def test_draw_reaches_the_tail_of_a_large_vocabulary() -> None:
    logits = torch.full((1, 100_000), -10.0)
    logits[0, 0] = 10.0  # the others have 2e-4 together, each less than float32 can add to 1
    ids, _, _ = draw(logits.expand(2, -1), torch.tensor([1 - 1e-9, 1 - 1e-4], dtype=torch.float64), 1.0)
    assert ids[0].item() == 99_999
    assert 1 < ids[1].item() < 99_999


def test_draw_at_temperature_0_takes_the_most_likely_token() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, -1.0, 2.9]])
    for uniform in (0.0, 0.999):
        ids, logprobs, cutoffs = draw(logits, torch.full((2,), uniform), 0)
        assert ids.tolist() == [1, 0]
        torch.testing.assert_close(logprobs, torch.log_softmax(logits, dim=1)[[0, 1], [1, 0]], rtol=0, atol=1e-6)


LOGITS = torch.tensor([[0.1, 0.4, 0.2, 0.05, 0.25]]).log()


@pytest.mark.parametrize(
    ("top_p", "top_k", "kept"),
    [
        (1.0, 1, [1]),
        (1.0, 2, [1, 4]),
        (1.0, 4, [0, 1, 2, 4]),
        (1.0, 5, [0, 1, 2, 3, 4]),
        (1.0, 99, [0, 1, 2, 3, 4]),
        (0.39, None, [1]),
        (0.41, None, [1, 4]),  # the token that reaches top_p is kept
        (0.64, None, [1, 4]),
        (0.66, None, [1, 2, 4]),
        (0.96, None, [0, 1, 2, 3, 4]),
        (0.6, 2, [1]),  # top_p applies after top_k: 0.4 of 0.65
        (0.62, 2, [1, 4]),
        (0.7, 3, [1, 4]),
        (0.8, 3, [1, 2, 4]),
    ],
)
def test_draw_with_filters_takes_kept_tokens_in_proportion(top_p: float, top_k: int | None, kept: list[int]) -> None:
    num_points = 1000
    ids, logprobs, cutoffs = draw(LOGITS.expand(num_points, -1), grid(num_points), 1.0, top_p, top_k)
    chances = LOGITS[0, kept].double().exp() / LOGITS[0, kept].double().exp().sum()
    counts = torch.bincount(ids, minlength=5)
    assert counts.nonzero()[:, 0].tolist() == kept
    assert (counts[kept] - num_points * chances).abs().max() <= 1.01
    torch.testing.assert_close(logprobs.exp().double(), chances[torch.searchsorted(torch.tensor(kept), ids)])
    assert cutoffs is not None
    # The cutoff gives the kept tokens, whichever of them was drawn and whatever constant all logits have in common.
    for drawn, cutoff in zip(ids.tolist(), cutoffs.tolist(), strict=True):
        assert (LOGITS[0] >= LOGITS[0, drawn] + cutoff).nonzero()[:, 0].tolist() == kept


def test_draw_without_a_filter_gives_no_cutoff() -> None:
    assert draw(LOGITS, grid(1), 1.0)[2] is None
    assert draw(LOGITS, grid(1), 1.0, 1.0, None)[2] is None


def test_draw_keeps_ties_with_the_last_kept_token() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 1.0, 0.0]])
    ids, _, cutoffs = draw(logits.expand(50, -1), grid(50), 1.0, 1.0, 2)
    assert cutoffs is not None and set(ids.tolist()) == {1, 2, 3}
    # Rounding moves no token across the cutoff, and never the drawn one.
    for rounding in (-5e-6, 0.0, 5e-6):
        for drawn, cutoff in zip(ids.tolist(), cutoffs.tolist(), strict=True):
            assert cutoff <= 0
            assert (logits[0] + rounding >= logits[0, drawn] + cutoff).tolist() == [False, True, True, True, False]


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 7), (0.5, None), (0.9, 40)])
@pytest.mark.parametrize("spacing", [1e-6, 5e-6, 1e-5, 3e-5])
def test_draw_cuts_far_from_every_token(top_p: float, top_k: int | None, spacing: float) -> None:
    logits = torch.rand(400, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 100 * spacing
    ids, _, cutoffs = draw(logits.float(), torch.full((400,), 0.5), 1.0, top_p, top_k)
    assert cutoffs is not None
    distances = (logits - logits.gather(1, ids[:, None]) - cutoffs[:, None]).abs()
    assert distances.min() > 4e-6  # a rounding error of either side moves none across


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 5), (0.5, None), (0.9, None), (0.5, 5), (0.8, 5), (0.9, 20)])
def test_draw_keeps_the_tokens_of_transformers_and_all_ties(top_p: float, top_k: int | None) -> None:
    logits = torch.randn(500, 60, generator=torch.Generator().manual_seed(0)).mul(8).round() / 4  # full of ties
    ids, _, cutoffs = draw(logits, torch.full((500,), 0.5), 1.0, top_p, top_k)
    kept = logits if top_k is None else TopKLogitsWarper(top_k)(ids, logits)
    kept = (kept if top_p == 1 else TopPLogitsWarper(top_p)(ids, kept)) > -torch.inf
    last = logits.masked_fill(~kept, torch.inf).amin(dim=1, keepdim=True)
    assert cutoffs is not None
    ours = logits >= logits.gather(1, ids[:, None]) + cutoffs[:, None]
    assert torch.equal(ours, logits >= last)  # transformers' top-p keeps some of the tokens as likely as the last
    assert not kept[~ours].any()


@pytest.mark.parametrize("top_k", [None, 3])
def test_draw_at_temperature_0_ignores_filters(top_k: int | None) -> None:
    ids, logprobs, _ = draw(LOGITS, torch.tensor([0.99]), 0, 1.0, top_k)
    assert ids.tolist() == [1]
    assert logprobs.exp().item() == pytest.approx(0.4 if top_k is None else 0.4 / 0.85)
