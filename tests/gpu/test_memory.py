"""The peak memory of each stage and method on a GPU is that which `rekatrain plan` predicts.

The real command trains for two steps in a separate process (tests/benchmarks/plan.py says how the peak is measured).
On a CPU one case is in test_plan_memory.py, and tests/benchmarks/plan.py runs all.
"""

import importlib
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

# Largest error of a prediction, as a fraction of the peak.
LIMIT = 0.1
SIZE, TOKENS = "135M", 16384  # shape of the model, and tokens of a micro-batch


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.launched
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("has_adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("stage", ["sft", "reward", "rloo"])
def test_peak_memory_on_a_gpu_is_that_of_the_plan(
    stage: str,
    has_adapter: bool,
    cl100k: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    plan = importlib.import_module("plan")
    plan.make_model(tmp_path / "model", cl100k, *plan.SIZES[SIZE])
    plan.write_rows(tmp_path, cl100k, TOKENS // 4)
    # Of RLOO the case with a reference; of full training with checkpointing, of adapters without.
    case = [
        case
        for case in plan.all_cases([SIZE], TOKENS, [], "cuda")
        if (case.stage, case.has_adapter) == (stage, has_adapter)
        and case.section["gradient_checkpointing"] != has_adapter
    ][-1]
    result = plan.run_case(case, tmp_path, {SIZE: tmp_path / "model"}, plan.count_prompt_tokens(cl100k))
    assert abs(result["ratio"] - 1) <= LIMIT, result
