"""A real vLLM answers evaluations: ours equals the one in process, and lm-evaluation-harness reads it. Slow: a minute.

VLLM_PYTHON=/path/to/vllm/bin/python LM_EVAL=/path/to/bin/lm_eval python -m pytest -m vllm tests/vllm/test_evaluation.py
"""

import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rekatrain.trainer.cli import main
from rekatrain.trainer.compare import compare
from tests.helpers.exports import serve_by_vllm, train_run

README = Path(__file__).parents[2] / "trainer" / "evaluation" / "README.md"
LM_EVAL = os.environ.get("LM_EVAL") or shutil.which("lm_eval")
NEEDS_LM_EVAL = "lm_eval is not on the PATH, and LM_EVAL names no other: pip install 'lm_eval[api]' in an environment"
TASK = """task: sums
dataset_path: json
dataset_kwargs: {data_files: {test: SUMS}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["<sep>"]}
metric_list: [{metric: exact_match}]
"""
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="VLLM_PYTHON names no python that has vLLM"),
]


@pytest.fixture(scope="module")
def served(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder with sums and an export that knows half of them, and the url of a vLLM that serves it."""
    folder = tmp_path_factory.mktemp("evaluation")
    run = train_run(folder, tokenizer)
    main(["export", str(run), str(folder / "rloo")])
    rows = [{"prompt": f"{n} + {n} =", "answer": str(2 * n)} for n in range(1, 13)]
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "other.jsonl").write_text(json.dumps({"prompt": "Not held out", "answer": "1"}) + "\n")
    with serve_by_vllm(folder / "rloo", folder) as url:
        yield folder, url


def evaluate(folder: Path, name: str, *, url: str | None, **settings: Any) -> dict[str, Any]:
    """Evaluate the export by the command line, in this process or by the server."""
    server = {} if url is None else {"base_url": f"{url}/v1", "model": "rloo", "format": "reka"}
    recipe = {
        "stage": "rloo",
        "output_dir": str(folder / "unused"),
        "model": {"pretrained_model_name_or_path": str(folder / "rloo"), "dtype": "float32"},
        "dataset": {"path": str(folder / "other.jsonl"), "format": "prompt_answer"},
        "eval_dataset": {"path": str(folder / "eval.jsonl"), "format": "prompt_answer"},
        "rewards": {"math_answer": {}},
        "rloo": {"max_steps": 1},
        "evaluate": {"max_completion_length": 40, **settings, **server},
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(recipe))
    main(["evaluate", str(path), "--out", str(folder / f"{name}.json")])
    return json.loads((folder / f"{name}.json").read_text())


def test_greedy_answers_of_vllm_are_those_in_process(served: tuple[Path, str]) -> None:
    folder, url = served
    here, there = (evaluate(folder, name, url=of) for name, of in (("here", None), ("there", url)))
    assert 0 < here["num_right"] < here["num_graded"] == 12
    for key in ("num_right", "num_graded", "thinking_tokens", "completions", "rewards"):
        assert here[key] == there[key], key
    texts = [[answer["completion"] for answer in result["answers"]] for result in (here, there)]
    assert texts[0] == texts[1]


def test_sampled_accuracy_of_vllm_is_that_in_process(served: tuple[Path, str]) -> None:
    folder, url = served
    settings = {"temperature": 1.0, "num_generations": 16}
    for name, of in (("sampled-here", None), ("sampled-there", url)):
        evaluate(folder, name, url=of, **settings)
    difference = compare(folder / "sampled-here.json", folder / "sampled-there.json").rewards["math_answer"]
    assert difference.low <= 0 <= difference.high and difference.mean_a > 0


@pytest.mark.skipif(LM_EVAL is None, reason=NEEDS_LM_EVAL)
def test_documented_line_of_lm_eval_measures_a_server(served: tuple[Path, str]) -> None:
    folder, url = served
    text = README.read_text()
    line = re.search(r"^    (lm_eval (?:.*\\\n)*.*)", text, re.MULTILINE)
    assert line
    tasks = folder / "tasks"
    tasks.mkdir()
    (tasks / "sums.yaml").write_text(TASK.replace("SUMS", str(folder / "eval.jsonl")))
    command = line[1].replace("\\\n", " ").replace("http://localhost:8000", url).replace("gsm8k", "sums")
    _, *arguments = shlex.split(command.replace("max_gen_toks=4096", "max_gen_toks=40"))
    out = ["--include_path", str(tasks), "--output_path", str(folder / "lm_eval")]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    hidden = {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(LM_EVAL), *arguments, *out], env=environment | hidden, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (result,) = (folder / "lm_eval").rglob("results_*.json")
    measured = json.loads(result.read_text())["results"]["sums"]["exact_match,none"]
    assert measured == pytest.approx(evaluate(folder, "for-lm-eval", url=None)["accuracy"])
