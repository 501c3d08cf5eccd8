"""The cost of an export that `rekatrain plan` states, against measured exports."""

from types import SimpleNamespace
from typing import Any

import pytest

from rekatrain.trainer.plan.export_cost import estimate_export


@pytest.mark.parametrize(
    ("hidden", "layers", "vocabulary", "measured_mb"), [(2048, 16, 32_000, 457), (1024, 8, 8000, 245)]
)
def test_memory_of_an_export_is_what_was_measured(
    hidden: int, layers: int, vocabulary: int, measured_mb: float
) -> None:
    # The models and results of tests/benchmarks/export_memory.py, with shards of 200 MB.
    linear = hidden * hidden * 5 // 2 + 3 * hidden * 4 * hidden
    shape = SimpleNamespace(
        num_base=layers * linear + 2 * vocabulary * hidden,
        num_linear=layers * linear,
        num_layers=layers,
        largest_module=max(vocabulary, 4 * hidden) * hidden,
    )
    plan: Any = SimpleNamespace(shape=shape, recipe=SimpleNamespace(model={"dtype": "bfloat16"}, stage="sft"))
    assert estimate_export(plan, shard_bytes=200e6).memory / 2**20 == pytest.approx(measured_mb, rel=0.1)
