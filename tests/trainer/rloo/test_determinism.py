"""`rloo.full_determinism`: deterministic kernels alone, for the run that sets it only."""

from pathlib import Path

import pytest
import torch

from rekatrain.trainer.cli import main
from rekatrain.trainer.rloo.distributed import set_determinism
from rekatrain.trainer.rloo.sampler.draw import BLOCK, draw, running_sums_by_products
from tests.end_to_end.small_runs import records, rloo_recipe, weights, write_data


def test_set_determinism_is_that_of_the_last_run() -> None:
    for is_full in (True, False):
        set_determinism(3, is_full=is_full)
        assert torch.are_deterministic_algorithms_enabled() == is_full
        first = torch.rand(4)
        set_determinism(3, is_full=is_full)
        assert torch.equal(torch.rand(4), first)
    torch.use_deterministic_algorithms(False)


def test_full_determinism_trains_as_the_default_on_a_cpu(
    tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    filters = {"top_p": 0.9, "top_k": 50, "max_steps": 2}
    for name, is_full in (("plain", False), ("full", True)):
        main(["train", str(rloo_recipe(tmp_path, name, model_folder, rloo={**filters, "full_determinism": is_full}))])
        assert torch.are_deterministic_algorithms_enabled() == is_full
    torch.use_deterministic_algorithms(False)
    plain, full = (weights(tmp_path / name, 2) for name in ("plain", "full"))
    assert all(torch.equal(full[name], tensor) for name, tensor in plain.items())
    plain_ids, full_ids = (
        [line["completion_ids"] for line in records(tmp_path / name, "rollouts.jsonl")] for name in ("plain", "full")
    )
    assert len(plain_ids) == 16 and full_ids == plain_ids


@pytest.mark.parametrize("num_values", [1, 5, BLOCK, BLOCK + 1, 1000])
def test_running_sums_by_products_equal_cumsum(num_values: int) -> None:
    values = torch.rand(3, num_values, dtype=torch.float64)
    torch.testing.assert_close(running_sums_by_products(values), values.cumsum(1), rtol=1e-14, atol=0)


def test_draw_by_products_draws_the_same_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a GPU with deterministic kernels; the uniform numbers are not within rounding of a boundary.
    torch.manual_seed(0)
    logits, uniforms = torch.randn(200, 1000) * 3, torch.rand(200)
    expected = [draw(logits, uniforms, 0.8), draw(logits, uniforms, 1.0, 0.9, 50)]
    monkeypatch.setattr("rekatrain.trainer.rloo.sampler.draw._running_sums", running_sums_by_products)
    for (ids, logprobs, _), (by_products, others, _) in zip(
        expected, [draw(logits, uniforms, 0.8), draw(logits, uniforms, 1.0, 0.9, 50)], strict=True
    ):
        assert torch.equal(ids, by_products)
        assert torch.equal(logprobs, others)
