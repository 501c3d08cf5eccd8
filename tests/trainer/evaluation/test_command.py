"""`rekatrain evaluate`: resumed, on several processes, of a server, with reasoning budgets; all answers are kept."""

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rekatrain.data.chat import encode_text
from rekatrain.data.errors import InputError
from rekatrain.trainer import evaluate as command
from rekatrain.trainer.cli import main
from rekatrain.trainer.held_out_prompts import EvaluateConfig
from tests.conftest import write_jsonl
from tests.helpers.forks import Launch, start_forked
from tests.helpers.json_servers import JsonServer
from tests.helpers.rloo import open_reasoning

SUMS = [{"prompt": f"{n} + {n} =", "answer": 2 * n, "source": ("even", "odd")[n % 2]} for n in range(1, 7)]


@pytest.fixture
def recipe_of(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes a recipe with six held-out sums; its model is tiny."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "rows.jsonl", {"prompt": "another", "answer": 1})
    write_jsonl(tmp_path / "sums.jsonl", *SUMS)

    def write(weights: Path = model_folder, **evaluate: Any) -> str:
        settings = {"reward": "math_answer", "max_completion_length": 12, "temperature": 1.0, "num_generations": 2}
        recipe = {
            "stage": "rloo",
            "output_dir": "run",
            "seed": 3,
            "model": {"pretrained_model_name_or_path": str(weights), "dtype": "float32"},
            "dataset": {"path": "rows.jsonl", "format": "prompt_answer"},
            "eval_dataset": {"path": "sums.jsonl", "format": "prompt_answer"},
            "rewards": {"math_answer": None, "regex": {"pattern": "[a-m]"}},
            "rloo": {"max_steps": 1},
            "evaluate": {**settings, **evaluate},
        }
        Path("recipe.yaml").write_text(json.dumps(recipe))
        return "recipe.yaml"

    return write


def test_evaluate_goes_on_where_a_killed_start_ended(
    recipe_of: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = recipe_of(per_device_generation_batch_size=4)  # two prompts at a time
    main(["evaluate", path, "--out", "whole.json"])
    sampled = command.sampled_answers
    batches = []

    def interrupted(*arguments: Any) -> Any:
        for batch in sampled(*arguments):
            yield batch
            batches.append(len(batch))
            if len(batches) == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(command, "sampled_answers", interrupted)
    with pytest.raises(SystemExit):
        main(["evaluate", path, "--out", "cut.json"])
    (journal,) = Path().glob("cut.json.answers-*.jsonl")
    with journal.open("a") as file:
        file.write('{"answer": {"prompt_index": 5, "ind')  # a kill has cut the last line
    assert not Path("cut.json").exists()
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", path, "evaluate.temperature=0.5", "--out", "cut.json"])
    assert caught.value.code == 2 and "holds answers with temperature 1.0, and this evaluation has 0.5" in (
        capsys.readouterr().err
    )
    main(["evaluate", path, "--out", "cut.json"])
    assert batches == [4, 4, 4], "the third start samples the last two prompts alone"
    assert json.loads(Path("cut.json").read_text()) == json.loads(Path("whole.json").read_text())
    assert not [*Path().glob("*.answers-*")]


@pytest.mark.launched
def test_evaluate_on_two_processes_equals_one(recipe_of: Callable[..., str], tmp_path: Path) -> None:
    path = recipe_of()
    main(["evaluate", path, "--out", "one.json"])
    run = start_forked(
        tmp_path,
        "-m",
        "rekatrain",
        "evaluate",
        path,
        "--out",
        "two.json",
        launch=Launch(num_processes=2, file="ddp.yaml"),
    )
    assert run.wait() == 0, run.output()
    assert json.loads(Path("two.json").read_text()) == json.loads(Path("one.json").read_text())
    assert len(json.loads(Path("two.json").read_text())["answers"]) == 12


def test_evaluate_prints_every_figure(recipe_of: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(Path("other.jsonl"), *[{"prompt": f"{n} - 1 =", "answer": n - 1} for n in range(1, 4)])
    path = recipe_of(reward="regex")
    sources = [{"path": name, "format": "prompt_answer", "source": name[:-6]} for name in ("sums.jsonl", "other.jsonl")]
    main(["evaluate", path, f"eval_dataset={json.dumps(sources)}", "--out", "out.json"])
    output = capsys.readouterr().out
    for pattern in (
        r"regex \d+\.\d% \[",
        r"avg@2 \S+ \[.*maj@2",
        r"maj@2 - avg@2: \S+ points \[",
        "pass@1 .*pass@2",
        r"regex: mean \S+ \[",
    ):
        assert re.search(pattern, output), pattern
    assert "source sums: " in output and "source other: " in output
    result = json.loads(Path("out.json").read_text())
    assert result["answers"][0]["gold"] == "2" and result["answers"][0]["source"] == "sums"
    assert {answer["vote"] for answer in result["answers"]} <= {0, 1, None}


def reply_of(content: str) -> tuple[int, dict[str, Any]]:
    message = {"role": "assistant", "content": content}
    return 200, {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}], "usage": {}}


def solve(path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Answer sums up to 4 right."""
    first = int(re.findall(r"\d+", body["messages"][-1]["content"])[0])
    return reply_of(f"It is \\boxed{{{2 * first if first <= 4 else 0}}}")


def test_evaluate_measures_a_served_model_on_two_servers(
    recipe_of: Callable[..., str], serve: Callable[..., JsonServer], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    servers = [serve(solve), serve(solve)]
    monkeypatch.setenv("MY_KEY", "secret-key")
    path = recipe_of(base_url=[server.url for server in servers], model="rival", api_key_env="MY_KEY")
    main(["evaluate", path, "--out", "out.json"])
    assert "rival: math_answer 66.7% [" in capsys.readouterr().out
    result = json.loads(Path("out.json").read_text())
    assert (result["num_right"], result["num_graded"], result["model"]) == (4, 6, {"served": "rival"})
    assert result["maj_at"] == {"1": 4 / 6, "2": 4 / 6} and "secret-key" not in Path("out.json").read_text()
    bodies = [body for server in servers for body in server.bodies]
    assert len(bodies) == 12 and len({body["seed"] for body in bodies}) == 12
    assert all(body["temperature"] == 1.0 and body["max_tokens"] == 12 for body in bodies)
    assert all(len(server.bodies) > 0 for server in servers)


def test_evaluate_keeps_the_answers_of_a_server_that_fails(
    recipe_of: Callable[..., str], serve: Callable[..., JsonServer], capsys: pytest.CaptureFixture[str]
) -> None:
    lock, asked = threading.Lock(), []

    def fails_for_three(path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        with lock:
            asked.append(body["messages"][-1]["content"])
        is_bad = asked[-1].startswith("3") and len(asked) <= 12
        return (400, {"error": "no threes"}) if is_bad else solve(path, body)

    server = serve(fails_for_three)
    path = recipe_of(base_url=server.url, model="rival", max_retries=0)
    with pytest.raises(SystemExit) as caught:
        main(["evaluate", path, "--out", "out.json"])
    assert caught.value.code == 1 and "2 requests have failed" in capsys.readouterr().err
    main(["evaluate", path, "--out", "out.json"])
    assert len(asked) == 14 and all(text.startswith("3") for text in asked[12:])
    assert json.loads(Path("out.json").read_text())["num_graded"] == 6


def test_evaluate_measures_each_reasoning_budget(
    recipe_of: Callable[..., str], model_folder: Path, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: Any
) -> None:
    model = LlamaForCausalLM.from_pretrained(model_folder)
    open_reasoning(model, tokenizer)
    model.save_pretrained(tmp_path / "thinks")
    tokenizer.save_pretrained(tmp_path / "thinks")
    closing = len(encode_text("\n</reasoning>\n\n", tokenizer))
    opening = len(encode_text(" <reasoning>\n", tokenizer))
    path = recipe_of(tmp_path / "thinks", reasoning_budgets=[0, 6, None], max_completion_length=opening + closing + 20)
    main(["evaluate", path, "--out", "out.json"])
    output = capsys.readouterr().out
    assert re.search(r"budget  thinking tokens  accuracy\n +0 .*\n +6 .*\n +none ", output)
    result = json.loads(Path("out.json").read_text())
    budgets = {point["reasoning_budget"]: point for point in result["budgets"]}
    thoughts = {
        budget: [a["num_thinking"] for a in result["answers"] if a.get("reasoning_budget") == budget]
        for budget in budgets
    }
    assert [*budgets] == [0, 6, None] and all(len(counts) == 12 for counts in thoughts.values())
    # The tag of a random policy is followed by any token, not by a new line: the count may be one less.
    assert max(thoughts[0]) == 0 and max(thoughts[6]) in (5, 6) and max(thoughts[None]) > 10
    assert budgets[6]["thinking_tokens"] == sum(thoughts[6]) / 12
    closed = [a for a in result["answers"] if a.get("reasoning_budget") == 6 and a["num_thinking"] > 4]
    assert closed and all("\n</reasoning>\n\n" in answer["completion"] for answer in closed)


def test_evaluate_closes_the_reasoning_of_a_served_model(
    recipe_of: Callable[..., str], serve: Callable[..., JsonServer], tokenizer: PreTrainedTokenizerFast
) -> None:
    def think(path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        text = tokenizer.decode(body["prompt"])
        if "</reasoning>" in text:
            return 200, {"choices": [{"text": "14 <sep>", "finish_reason": "stop", "stop_reason": "<sep>"}]}
        thought = encode_text(" <reasoning>\n" + "hm " * 200, tokenizer)[: body["max_tokens"]]
        return 200, {"choices": [{"text": tokenizer.decode(thought), "finish_reason": "length"}]}

    server = serve(think)
    path = recipe_of(
        base_url=server.url,
        model="m",
        format="reka",
        reasoning_budgets=[0, 30],
        max_completion_length=100,
        num_generations=1,
    )
    main(["evaluate", path, "--out", "out.json"])
    result = json.loads(Path("out.json").read_text())
    assert [point["reasoning_budget"] for point in result["budgets"]] == [0, 30] and len(server.bodies) == 24
    zero, thirty = (point["thinking_tokens"] for point in result["budgets"])
    assert zero <= 1 and 29 <= thirty <= 31
    assert all(answer["completion"].endswith("</reasoning>\n\n14 <sep>") for answer in result["answers"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_url": "http://localhost:1/v1"}, "base_url and evaluate.model go together"),
        ({"api_key_env": "KEY"}, "need base_url"),
        ({"reasoning_budgets": [512]}, "each must be smaller than evaluate.max_completion_length"),
        ({"reasoning_budgets": [1, 1]}, "write different numbers"),
        ({"reasoning_budgets": [1], "base_url": "http://localhost:1/v1", "model": "m"}, "needs evaluate.format: reka"),
    ],
)
def test_evaluate_config_rejects_what_contradicts_itself(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        EvaluateConfig(**settings)
