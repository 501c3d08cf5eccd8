"""`rekatrain generate` and `filter` against the real vLLM, with ids and with messages."""

import json
import os
from pathlib import Path

import pytest

from rekatrain.data.chat import parse_completion
from rekatrain.trainer import api
from tests.vllm.test_server import LiveServer, folder, server  # noqa: F401  # fixtures

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="VLLM_PYTHON names no python with vLLM"),
]


def test_generate_and_filter_read_a_real_vllm_server(
    server: LiveServer,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(server.folder))
    own = {"base_url": f"{server.url}/v1", "model": server.models()[0], "format": "reka", "concurrency": 4}
    keys = {"num_generations": 4, "max_completion_length": 24, "server": own}
    recipe = {
        "stage": "sft",
        "output_dir": "unused",
        "model": {"pretrained_model_name_or_path": str(server.folder / "model"), "dtype": "float32"},
        "dataset": {"path": str(server.folder / "sums.jsonl"), "format": "prompt_answer"},
        "rewards": {"reasoning_format": None},
        "generate": {"out": "made", "keep": "all", **keys},
        "filter": {"out": "kept", "pass_rate": {}, **keys},
    }
    Path("recipe.yaml").write_text(json.dumps(recipe))
    rows = [json.loads(line) for line in api.generate("recipe.yaml").read_text().splitlines()]
    answers = [json.loads(line) for line in Path("made/answers.jsonl").read_text().splitlines()]
    assert len(answers) == 32 and all(answer["completion_tokens"] <= 24 for answer in answers)
    reasons = {answer["finish_reason"] for answer in answers}
    assert "eos" in reasons and reasons <= {"stop", "eos", "length"}
    for answer in answers:
        assert parse_completion(answer["text"]).finish_reason == answer["finish_reason"]
    assert {row["generated_by"] for row in rows} == {own["model"]}
    filtered = [json.loads(line) for line in api.filter_prompts("recipe.yaml").read_text().splitlines()]
    assert len(filtered) == 8 and all(0 <= row["pass_rate"] <= 1 and row["num_judged"] == 4 for row in filtered)
    assert "8 of 8 prompts have a pass rate from 0 to 1" in capsys.readouterr().out
