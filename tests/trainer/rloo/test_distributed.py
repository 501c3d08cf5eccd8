"""Tests of GradientClipper and update_weights in trainer/rloo/distributed.py."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.rloo.distributed import FIRST_NORMS, GradientClipper, make_accelerator, update_weights
from tests.helpers.forks import Launch, start_forked
from tests.trainer.rloo.float32_gradients import NUM_BATCHES, SMALL


def make_clipper(**settings: float) -> GradientClipper:
    """Make a clipper with settings of RLOOConfig."""
    return GradientClipper(RLOOConfig(max_steps=1, **settings))


def step(clipper: GradientClipper, model: torch.nn.Module) -> None:
    """Update the weights as the loop does; leave the gradient that was applied in `grad`."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    before = model.weight.detach().clone()
    update_weights(Accelerator(cpu=True), model, optimizer, clipper)
    model.weight.grad = before - model.weight.detach()  # at rate 1 the step is the clipped gradient


def clip(clipper: GradientClipper, norm: float) -> tuple[float, float]:
    """Clip a gradient of this norm -> its norm afterwards, and the limit that was logged."""
    model = torch.nn.Linear(2, 1, bias=False).double()
    model.weight.grad = torch.tensor([[0.6 * norm, 0.8 * norm]], dtype=torch.float64)
    step(clipper, model)
    metrics = clipper.metrics()
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5)
    return model.weight.grad.norm().item(), metrics["grad_norm_limit"]


def test_later_run_of_a_process_has_its_own_precision() -> None:
    for bf16, precision in ((False, "no"), (True, "bf16"), (False, "no")):
        assert make_accelerator(bf16=bf16, ddp_timeout=60).mixed_precision == precision


@pytest.mark.launched
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_backward_adds_bfloat16_gradients_up_in_float32(stage: int, tmp_path: Path) -> None:
    script = Path(__file__).with_name("float32_gradients.py")
    started = start_forked(tmp_path, str(script), "norm.json", launch=Launch(num_processes=2, file=f"zero{stage}.yaml"))
    assert started.wait() == 0, started.output()
    # Over micro-batches and both processes, of 8 equal elements; with sums in bfloat16 it is 8^0.5 times 1.06 or less.
    expected = math.sqrt(8) * (1 + (2 * NUM_BATCHES - 1) * SMALL)
    assert json.loads((tmp_path / "norm.json").read_text()) == pytest.approx(expected, rel=1e-6)


NORMS = [3.0, 1.0, 2.0, 8.0, 5.0, 0.5, 4.0, 2.5, 1.5, 6.0, 20.0, 1.0, 30.0, 2.0, 9.0]


def test_gradient_clipper_has_a_fixed_limit_by_default() -> None:
    clipper = make_clipper(max_grad_norm=2.0)
    for norm in NORMS:
        clipped, limit = clip(clipper, norm)
        assert limit == 2.0
        assert clipped == pytest.approx(min(norm, 2.0), rel=1e-5)


@pytest.mark.parametrize("quantile", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("window", [4, 12, 100])
@pytest.mark.parametrize("max_norm", [2.5, 1e9])
def test_gradient_clipper_limit_is_the_capped_quantile(quantile: float, window: int, max_norm: float) -> None:
    clipper = make_clipper(max_grad_norm=max_norm, grad_norm_quantile=quantile, grad_norm_window=window)
    for done, norm in enumerate(NORMS):
        recent = NORMS[max(0, done - window) : done]
        is_known = len(recent) >= min(FIRST_NORMS, window)
        expected = min(max_norm, float(np.quantile(recent, quantile))) if is_known else max_norm
        clipped, limit = clip(clipper, norm)
        assert limit == pytest.approx(expected, rel=1e-5)
        assert clipped == pytest.approx(min(norm, limit), rel=1e-5)


def test_gradient_clipper_ignores_norms_of_zero() -> None:
    # Groups without variance give the gradient 0; a quantile of such norms would scale every later one down to 0.
    clipper = make_clipper(grad_norm_quantile=0.5)
    for _ in range(3 * FIRST_NORMS):
        assert clip(clipper, 0.0) == (0.0, 1.0)
    clipped, limit = clip(clipper, 0.7)
    assert (clipped, limit) == (pytest.approx(0.7), 1.0)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_gradient_clipper_ignores_norms_that_are_not_finite(value: float) -> None:
    clipper = make_clipper(grad_norm_quantile=1.0)
    for norm in [0.5] * FIRST_NORMS:
        clip(clipper, norm)
    model = torch.nn.Linear(2, 1, bias=False)
    model.weight.grad = torch.tensor([[value, 1.0]])
    step(clipper, model)
    assert clipper.metrics()["grad_norm"] == pytest.approx(value, nan_ok=True)
    assert clip(clipper, 2.0)[1] == pytest.approx(0.5, rel=1e-5)


def test_gradient_clipper_norms_are_part_of_a_checkpoint(tmp_path: Path) -> None:
    settings = {"grad_norm_quantile": 0.5, "grad_norm_window": 12}
    whole = make_clipper(**settings)
    limits = [clip(whole, norm)[1] for norm in NORMS]

    stopped = make_clipper(**settings)
    for norm in NORMS[:11]:
        clip(stopped, norm)
    path = tmp_path / "state.json"
    path.write_text(json.dumps(stopped.state_dict()))

    resumed = make_clipper(**settings)
    resumed.load_state_dict(json.loads(path.read_text()))
    assert [clip(resumed, norm)[1] for norm in NORMS[11:]] == limits[11:]
