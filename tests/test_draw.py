"""One uniform number draws one token, exactly from the distribution, also from a part of it."""

import math

import pytest
import torch

from trainer.rloo.draw import draw


def grid(num_points: int) -> torch.Tensor:
    """The middles of `num_points` equal parts of [0, 1)."""
    return (torch.arange(num_points, dtype=torch.float64) + 0.5) / num_points


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_each_token_takes_its_probability_of_the_uniforms(temperature: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(60) * 3
    num_points = 20_000
    ids, logprobs, floors = draw(logits.expand(num_points, -1), grid(num_points), temperature)

    probabilities = torch.softmax(logits.double() / temperature, dim=0)
    counts = torch.bincount(ids, minlength=len(logits))
    assert (counts - num_points * probabilities).abs().max() <= 1.01
    torch.testing.assert_close(logprobs.double(), probabilities.log()[ids], rtol=0, atol=1e-5)
    assert torch.equal(ids, ids.sort().values)


def test_each_row_is_drawn_from_its_own_logits() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3), 0.0], [0.0, 0.0]])
    ids, logprobs, floors = draw(logits, torch.tensor([0.6, 0.6, 0.4]), 1.0)
    assert ids.tolist() == [1, 0, 0]
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.5, 0.75, 0.5]))


def test_a_token_without_probability_is_never_drawn() -> None:
    torch.manual_seed(0)
    logits = torch.randn(200, 12)
    forbidden = [0, 1, 5, 10, 11]
    logits[:, forbidden] = -math.inf
    edges = [0.0, 2.0**-53, 0.5, 1 - 2.0**-53]  # numpy's uniforms are the multiples of 2^-53 below 1
    for uniform in edges:
        ids, logprobs, floors = draw(logits, torch.full((200,), uniform, dtype=torch.float64), 1.0)
        assert not set(ids.tolist()) & set(forbidden)
        assert logprobs.isfinite().all()


def test_the_tail_of_a_large_vocabulary_can_be_drawn() -> None:
    logits = torch.full((1, 100_000), -10.0)
    logits[0, 0] = 10.0  # the others share 2e-4, each less than float32 can add to 1
    ids, _, _ = draw(logits.expand(2, -1), torch.tensor([1 - 1e-9, 1 - 1e-4], dtype=torch.float64), 1.0)
    assert ids[0].item() == 99_999
    assert 1 < ids[1].item() < 99_999


def test_temperature_zero_takes_the_most_likely_token_and_its_logprob_at_one() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, -1.0, 2.9]])
    for uniform in (0.0, 0.999):
        ids, logprobs, floors = draw(logits, torch.full((2,), uniform), 0)
        assert ids.tolist() == [1, 0]
        torch.testing.assert_close(logprobs, torch.log_softmax(logits, dim=1)[[0, 1], [1, 0]], rtol=0, atol=1e-6)
