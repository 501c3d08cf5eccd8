"""`rloo.full_determinism`: deterministic kernels alone, for the run that sets it only."""

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rekatrain.trainer.cli import main
from rekatrain.trainer.rloo.distributed import set_determinism
from rekatrain.trainer.rloo.sampler.draw import BLOCK, draw, running_sums_by_products
from tests.end_to_end.small_runs import LORA, records, rloo_recipe, weights, write_data, write_recipe

# PyTorch's list of what raises where deterministic kernels are required, and the operators that this means.
RAISING = {
    "nn.AvgPool3d": ["avg_pool3d_backward"],
    "nn.AdaptiveAvgPool2d": ["_adaptive_avg_pool2d_backward"],
    "nn.AdaptiveAvgPool3d": ["_adaptive_avg_pool3d_backward"],
    "nn.AdaptiveMaxPool2d": ["adaptive_max_pool2d_backward"],
    "nn.FractionalMaxPool2d": ["fractional_max_pool2d_backward"],
    "nn.FractionalMaxPool3d": ["fractional_max_pool3d_backward"],
    "nn.MaxUnpool1d": ["max_unpool2d"],
    "nn.MaxUnpool2d": ["max_unpool2d"],
    "nn.MaxUnpool3d": ["max_unpool3d"],
    "nn.functional.interpolate": [f"upsample_{kind}_backward" for kind in ("linear1d", "bilinear2d", "bicubic2d")],
    "nn.ReflectionPad1d": ["reflection_pad1d_backward"],
    "nn.ReflectionPad2d": ["reflection_pad2d_backward"],
    "nn.ReflectionPad3d": ["reflection_pad3d_backward"],
    "nn.NLLLoss": ["nll_loss2d_forward"],  # of images alone: that of tokens has no atomics
    "nn.CTCLoss": ["_ctc_loss_backward"],
    "nn.EmbeddingBag": ["_embedding_bag_backward"],
    "Tensor.put_": ["put_", "put"],
    "histc": ["histc"],
    "bincount": ["bincount"],
    "median": ["median"],
    "nn.functional.grid_sample": ["grid_sampler_2d_backward", "grid_sampler_3d_backward"],
    "cumsum": ["cumsum"],  # of floating-point numbers
    "Tensor.scatter_reduce": ["scatter_reduce", "scatter_reduce_"],
    "Tensor.resize_": [],  # of quantized tensors
}


def test_set_determinism_is_that_of_the_last_run() -> None:
    for is_full in (True, False):
        set_determinism(3, is_full=is_full)
        assert torch.are_deterministic_algorithms_enabled() == is_full
        first = torch.rand(4)
        set_determinism(3, is_full=is_full)
        assert torch.equal(torch.rand(4), first)
    torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the default of a GPU is not deterministic")
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


class Operators(TorchDispatchMode):
    """Collects the operators of a run; of `cumsum` and `median`, those over floating-point numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        is_float = any(leaf.is_floating_point() for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor))
        if is_float or name not in ("cumsum", "median"):
            self.names.add(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch itself raises on a GPU, whatever its version")
def test_raising_is_the_list_of_this_version_of_torch() -> None:
    text = str(torch.use_deterministic_algorithms.__doc__)
    listed = text.split("operations will throw a")[1].split("In addition")[0]
    assert set(re.findall(r"\* :(?:func|class):`torch\.([\w.]+)`", listed)) == RAISING.keys()


@pytest.mark.parametrize("stage", ["sft", "reward", "rloo", "rloo, lora"])
def test_full_determinism_runs_nothing_that_raises_on_a_gpu(
    stage: str, tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    # As on a GPU.
    monkeypatch.setattr("rekatrain.trainer.rloo.sampler.draw._running_sums", running_sums_by_products)
    settings: dict[str, Any] = {"full_determinism": True, "max_steps": 1, "gradient_checkpointing": True}
    if stage.startswith("rloo"):
        is_lora = "lora" in stage
        changes = {"num_iterations": 2, "importance_sampling_level": "token"} if is_lora else {"top_p": 0.9}
        lora = {"lora": LORA} if is_lora else {}
        recipe = rloo_recipe(tmp_path, "run", model_folder, rloo=settings | changes, **lora)
    else:
        data = {"path": f"{stage}.jsonl", "format": "preference" if stage == "reward" else "prompt_answer"}
        sections = {stage: settings | {"save_steps": 1, "per_device_train_batch_size": 4}}
        recipe = write_recipe(tmp_path, "run", model_folder, stage=stage, dataset=data, **sections)
    operators = Operators()
    with nullcontext() if torch.cuda.is_available() else operators:  # on a GPU torch itself raises
        main(["train", str(recipe)])
    assert torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
    assert torch.cuda.is_available() or "mm" in operators.names
    assert not operators.names & {name for names in RAISING.values() for name in names}


def test_operators_finds_what_raises_on_a_gpu() -> None:
    # Without deterministic kernels the sampler's sums are running ones.
    with Operators() as operators:
        draw(torch.randn(2, 1000), torch.rand(2), 0.8)
    assert "cumsum" in operators.names
