"""The probe of a checkpoint: rounding to bfloat16 passes, another model does not."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rekatrain.trainer.cli import main
from rekatrain.trainer.models.probe import TrainingProbe, find_difference, mean_kl, run_probe
from tests.conftest import tiny_llama
from tests.helpers.exports import servable_llama, write_sft_recipe

TEXTS = [list(range(5, 45)), list(range(60, 75))]


def test_kl_is_that_of_the_distributions(tokenizer) -> None:
    one, other = (run_probe(tiny_llama(tokenizer, seed=seed), TEXTS) for seed in (0, 1))
    assert one.nexts is not None and other.nexts is not None
    ours, theirs = one.nexts[0].double(), other.nexts[0].double()
    assert mean_kl(one, other) == pytest.approx(float((ours.exp() * (ours - theirs)).sum() / len(ours)), abs=1e-6)
    assert mean_kl(one, one) == 0.0 and mean_kl(one, replace(one, nexts=None)) is None


def test_bfloat16_is_held_by_the_kl(tokenizer) -> None:
    probe = replace(run_probe(tiny_llama(tokenizer), TEXTS), dtype="bfloat16")
    assert probe.nexts is not None

    def moved(by: float) -> TrainingProbe:
        """The probe with other distributions, and log-probabilities of the texts that moved by 0.2."""
        torch.manual_seed(0)
        nexts = (probe.nexts[0] + by * torch.randn_like(probe.nexts[0])).log_softmax(1), probe.nexts[1]
        return replace(probe, logprobs=[values - 0.2 for values in probe.logprobs], nexts=nexts)

    assert find_difference(probe, moved(0.1)) is None
    difference = find_difference(probe, moved(0.4))
    assert difference is not None and "mean KL" in difference and "0.02 is allowed" in difference
    assert "up to 0.2" in (find_difference(replace(probe, dtype="float32"), replace(moved(0), dtype="float32")) or "")
    nan = replace(probe, nexts=(probe.nexts[0] * float("nan"), probe.nexts[1]))
    assert find_difference(probe, nan) is not None


@pytest.mark.slow
def test_confident_model_is_exported_in_bfloat16(tmp_path: Path, tokenizer) -> None:
    recipe = write_sft_recipe(tmp_path, tokenizer)
    model = servable_llama(tokenizer)
    model.lm_head.weight.data *= 10  # its unlikely tokens have e^-60, as a trained model's have
    model.save_pretrained(tmp_path / "model")
    main(["train", str(recipe), "sft.max_steps=2", "sft.learning_rate=1e-4"])
    main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--dtype", "bfloat16"])
    assert (tmp_path / "out" / "config.json").exists()
