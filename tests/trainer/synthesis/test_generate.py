"""`rekatrain generate`: rows that SFT reads back, rules, and nothing asked twice."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rekatrain import InputError, load_recipe
from rekatrain.data.chat import IGNORED_LABEL, FinishReason
from rekatrain.trainer import api, sft
from rekatrain.trainer.cli import main
from rekatrain.trainer.synthesis.config import GenerateConfig
from rekatrain.trainer.synthesis.journal import Answer, Score
from rekatrain.trainer.synthesis.keep import choose, without_duplicates
from tests.conftest import write_jsonl
from tests.helpers.json_servers import JsonServer
from tests.package.processes import environment

SUMS = [{"prompt": f"{n} + {n} =", "answer": 2 * n, "level": n} for n in range(1, 7)]
Recipes = Callable[..., str]


@pytest.fixture
def recipe_of(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Recipes:
    """Writes a recipe with sums and a section `generate:`; gives its path."""
    monkeypatch.chdir(tmp_path)

    def write(name: str = "recipe.yaml", **sections: Any) -> str:
        if not Path("rows.jsonl").exists():
            write_jsonl(Path("rows.jsonl"), *SUMS)
        recipe = {
            "stage": "sft",
            "output_dir": "run",
            "model": {"pretrained_model_name_or_path": str(model_folder), "dtype": "float32"},
            "dataset": {"path": "rows.jsonl", "format": "prompt_answer"},
            "rewards": {"exact_match": None},
            **sections,
        }
        Path(name).write_text(json.dumps(recipe))
        return name

    return write


def chat_reply(content: str, *, finish_reason: str = "stop", **message: str) -> tuple[int, dict]:
    usage = {"prompt_tokens": 10, "completion_tokens": 5}
    sent = {"role": "assistant", "content": content, **message}
    return 200, {"choices": [{"index": 0, "message": sent, "finish_reason": finish_reason}], "usage": usage}


def right_on_even_seeds(path: str, body: dict) -> tuple[int, dict]:
    """Answer the sum; a seed that is odd gets a wrong one."""
    number = int(body["messages"][-1]["content"].split()[0])
    return chat_reply(str(2 * number if body["seed"] % 2 == 0 else 1), reasoning_content=f"Twice {number}.")


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def section(server: JsonServer, **keys: Any) -> dict:
    own = {"base_url": f"{server.url}/v1", "model": "teacher", "concurrency": 4, "max_retries": 0}
    return {"out": "made", "num_generations": 8, "server": own, **keys}


def test_generate_writes_the_rows_that_sft_trains(recipe_of: Recipes, serve: Callable[..., JsonServer]) -> None:
    server = serve(right_on_even_seeds)
    path = api.generate(recipe_of(generate=section(server)))
    assert path == Path("made/rows.jsonl")
    rows = read_rows(path)
    assert sorted({row["level"] for row in rows}) == [1, 2, 3, 4, 5, 6]
    for row in rows:
        assert row["messages"][0] == {"role": "user", "content": SUMS[row["level"] - 1]["prompt"]}
        # eight equal right answers are one row
        thought = f"Twice {row['level']}."
        answer = {"role": "assistant", "content": str(2 * row["level"]), "reasoning_content": thought}
        assert row["messages"][1:] == [answer]
        assert (row["generated_by"], row["generated_seed"], row["reward"]) == ("teacher", 0, 1.0)
        assert row["rewards"] == {"exact_match": 1.0} and row["answer"] == str(2 * row["level"])
        assert row["generated_from"] == f"rows.jsonl:{row['level']}"
    assert len(rows) == 6
    task = sft.prepare(load_recipe(recipe_of("sft.yaml", dataset={"path": str(path)})))
    texts = [task.tokenizer.decode([one for one in row.labels if one != IGNORED_LABEL]) for row in task.rows]
    assert texts == [f" <reasoning>\nTwice {n}.\n</reasoning>\n\n{2 * n} <sep>" for n in range(1, 7)]


def test_generate_asks_nothing_twice(recipe_of: Recipes, serve: Callable[..., JsonServer]) -> None:
    server = serve(right_on_even_seeds)
    first = read_rows(api.generate(recipe_of(generate=section(server, num_generations=2))))
    assert len(server.bodies) == 12
    assert read_rows(api.generate(recipe_of(generate=section(server, num_generations=2)))) == first
    assert len(server.bodies) == 12
    # more completions, more prompts and another rule ask for what is missing
    write_jsonl(Path("rows.jsonl"), *SUMS, {"prompt": "7 + 7 =", "answer": 14, "level": 7}, SUMS[0])
    api.generate(recipe_of(generate=section(server, num_generations=3)))
    assert len(server.bodies) == 21
    everything = read_rows(api.generate(recipe_of(generate=section(server, num_generations=3, keep="all"))))
    assert len(server.bodies) == 21
    assert max(Counter((body["messages"][-1]["content"], body["seed"]) for body in server.bodies).values()) == 1
    assert {row["messages"][-1]["content"] for row in everything} >= {"1"}
    # other rewards score the answers that are there
    rewards = {"exact_match": {"weight": 2.0}}
    again = read_rows(api.generate(recipe_of(generate=section(server, num_generations=3), rewards=rewards)))
    assert len(server.bodies) == 21 and {row["reward"] for row in again} == {2.0}


def test_generate_rejects_answers_of_other_settings(recipe_of: Recipes, serve: Callable[..., JsonServer]) -> None:
    server = serve(right_on_even_seeds)
    api.generate(recipe_of(generate=section(server)))
    with pytest.raises(InputError, match="'made' holds answers with temperature 1.0, and the recipe has 0.5"):
        api.generate(recipe_of(generate=section(server, temperature=0.5)))
    Path("full").mkdir()
    Path("full/notes.txt").write_text("mine")
    with pytest.raises(InputError, match="'full' holds other files"):
        api.generate(recipe_of(generate=section(server, out="full")))


@pytest.mark.launched
@pytest.mark.slow
def test_generate_survives_kill_9(
    recipe_of: Recipes, serve: Callable[..., JsonServer], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lock, sent = threading.Lock(), Counter()

    def slow(path: str, body: dict) -> tuple[int, dict]:
        with lock:
            sent[body["messages"][-1]["content"], body["seed"]] += 1
        time.sleep(0.15)
        return right_on_even_seeds(path, body)

    server = serve(slow)
    write_jsonl(Path("rows.jsonl"), *[{"prompt": f"{n} + {n} =", "answer": 2 * n} for n in range(40)])
    recipe = recipe_of(generate=section(server, num_generations=4, keep="all"))
    command = [sys.executable, "-m", "rekatrain", "generate", recipe]
    kills = 0
    answers = tmp_path / "made" / "answers.jsonl"
    for goal in (20, 80):
        process = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not answers.exists() or answers.read_bytes().count(b"\n") < goal:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        with answers.open("ab") as file:  # a kill within a write
            file.write(b'{"prompt": "abc", "ind')
    with caplog.at_level("INFO"):
        api.generate(recipe)
    assert "160 of 160 completions" in caplog.messages[-1]
    assert len(sent) == 160
    # at most the requests in flight at a kill are sent again
    assert sum(sent.values()) - 160 <= kills * 4 and max(sent.values()) <= 1 + kills
    keys = [(record["prompt"], record["index"]) for record in read_rows(answers)]
    assert len(keys) == len(set(keys)) == 160
    scores = [(record["prompt"], record["index"]) for record in read_rows(tmp_path / "made" / "scores.jsonl")]
    assert sorted(scores) == sorted(keys)


def test_generate_in_process_repeats_its_draws(recipe_of: Recipes, capsys: pytest.CaptureFixture[str]) -> None:
    keys = {"num_generations": 3, "max_completion_length": 12, "keep": "all", "per_device_generation_batch_size": 6}
    whole = api.generate(recipe_of(generate={"out": "whole", **keys}))
    answers = [json.loads(line) for line in Path("whole/answers.jsonl").read_text().splitlines()]
    assert len(answers) == 18
    # a part of the prompts first, one of whose answers is lost
    dataset = {"path": "rows.jsonl", "format": "prompt_answer", "limit": 3}
    api.generate(recipe_of(generate={"out": "parts", **keys}, dataset=dataset))
    file = Path("parts/answers.jsonl")
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:-2]))
    parts = api.generate(recipe_of(generate={"out": "parts", **keys}))
    by_key = {(one["prompt"], one["index"]): one for one in answers}
    assert {(one["prompt"], one["index"]): one for one in read_rows(file)} == by_key
    assert parts.read_text() == whole.read_text()


def test_generate_reads_teachers_of_any_format(recipe_of: Recipes, serve: Callable[..., JsonServer]) -> None:
    replies = {
        "1 + 1 =": chat_reply("<think>Twice 1.</think>\n2"),
        "2 + 2 =": chat_reply("4", reasoning="Twice 2."),
        "3 + 3 =": chat_reply("<think>never closed", finish_reason="length"),
        "4 + 4 =": chat_reply("8 <sep> human: more"),
        "5 + 5 =": chat_reply("</think>10"),
        "6 + 6 =": chat_reply(""),
    }
    server = serve(lambda path, body: replies[body["messages"][-1]["content"]])
    own = section(server)["server"] | {"reasoning_tags": ["<think>", "</think>"], "extra_body": {"seed": None, "x": 1}}
    rows = read_rows(api.generate(recipe_of(generate={"out": "made", "num_generations": 1, "server": own})))
    found = {row["messages"][0]["content"]: row["messages"][1] for row in rows}
    assert found == {
        "1 + 1 =": {"role": "assistant", "content": "2", "reasoning_content": "Twice 1."},
        "2 + 2 =": {"role": "assistant", "content": "4", "reasoning_content": "Twice 2."},
        "5 + 5 =": {"role": "assistant", "content": "10"},
    }
    assert all("seed" not in body and body["x"] == 1 and body["model"] == "teacher" for body in server.bodies)


def test_generate_sends_ids_to_servers_of_the_format(
    recipe_of: Recipes, serve: Callable[..., JsonServer], tokenizer: PreTrainedTokenizerFast
) -> None:
    def answer(path: str, body: dict) -> tuple[int, dict]:
        prompt = tokenizer.decode(body["prompt"])
        number = int(re.findall(r"\d+", prompt)[0])
        assert path == "/v1/completions" and prompt == f"human: {number} + {number} = <sep> assistant:"
        choice = {
            1: {"text": " 2 <sep>", "finish_reason": "stop", "stop_reason": "<sep>"},  # vLLM
            2: {"text": " 4 ", "finish_reason": "stop"},  # llama.cpp leaves the stop out
            3: {"text": " 6", "finish_reason": "stop", "stop_reason": None},  # vLLM: the eos token
            4: {"text": " 8", "finish_reason": "length"},
        }.get(number, {"text": " 0 <sep> human:", "finish_reason": "stop"})
        return 200, {"choices": [choice]}

    server = serve(answer)
    own = section(server)["server"] | {"format": "reka"}
    keys = {"out": "made", "num_generations": 1, "max_completion_length": 8}
    rows = read_rows(api.generate(recipe_of(generate={**keys, "server": own})))
    assert [row["messages"][1]["content"] for row in rows] == ["2", "4", "6"]
    reasons = [record["finish_reason"] for record in read_rows(Path("made/answers.jsonl"))]
    assert Counter(reasons) == {"stop": 4, "eos": 1, "length": 1}


def test_generate_reports_servers_that_fail(recipe_of: Recipes, serve: Callable[..., JsonServer]) -> None:
    broken = serve(lambda path, body: (401, {"error": "no key"}))
    with pytest.raises(InputError, match="the server answers no request: .*401"):
        api.generate(recipe_of(generate=section(broken)))

    def fails_once(path: str, body: dict) -> tuple[int, dict]:
        return (400, {}) if body["messages"][-1]["content"] == "3 + 3 =" else right_on_even_seeds(path, body)

    server = serve(fails_once)
    keys = {"num_generations": 1, "keep": "all"}
    assert len(read_rows(api.generate(recipe_of(generate=section(server, **keys))))) == 5
    server.answer = right_on_even_seeds
    assert len(read_rows(api.generate(recipe_of(generate=section(server, **keys))))) == 6
    assert len(server.bodies) == 7


def test_generate_counts_tokens_and_cost(
    recipe_of: Recipes, serve: Callable[..., JsonServer], caplog: pytest.LogCaptureFixture
) -> None:
    server = serve(right_on_even_seeds)
    keys = section(server, num_generations=1)
    keys["server"] |= {"prompt_price": 1000.0, "completion_price": 20000.0}
    with caplog.at_level("INFO"):
        main(["generate", recipe_of(generate=keys), "generate.num_generations=2"])
    # 12 completions of 10 and 5 tokens
    assert "120 prompt tokens, 60 completion tokens; cost 1.32" in caplog.messages[-1]


def judged(index: int, text: str, total: float | None, *, right: bool) -> tuple[int, Answer, Score]:
    answer = Answer(text=text, finish_reason=FinishReason.STOP, prompt_tokens=1, completion_tokens=1)
    return index, answer, Score(total=total, rewards={"right": float(right), "style": 0.5})


GROUP = [
    judged(0, "long and right", 1.0, right=True),
    judged(1, "wrong", 0.9, right=False),
    judged(2, "right", 0.8, right=True),
    judged(3, "failed", None, right=False),
    judged(4, "right too", 1.0, right=True),
]


@pytest.mark.parametrize(
    ("keys", "kept"),
    [
        ({"keep": "all"}, [0, 4, 1, 2, 3]),
        ({"keep": "right"}, [0, 4, 2]),
        ({"keep": "right", "max_per_prompt": 2}, [0, 4]),
        ({"keep": "best"}, [0]),
        ({"keep": "best", "threshold": 1.5}, []),
        ({"keep": "shortest_right"}, [2]),
        ({"keep": "above", "threshold": 0.9}, [0, 4, 1]),
    ],
)
def test_choose_keeps_what_the_rule_says(keys: dict, kept: list[int]) -> None:
    config = GenerateConfig(out="made", **keys)
    assert [index for index, _, _ in choose(GROUP, config, ["right"])] == kept


def test_without_duplicates_ignores_white_space() -> None:
    group = [
        judged(0, " 4 <sep>", 1, right=True),
        judged(1, "  4\n<sep>", 1, right=True),
        judged(2, "5", 1, right=True),
    ]
    assert [index for index, _, _ in without_duplicates(group)] == [0, 2]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"keep": "above"}, "set generate.threshold"),
        ({"keep": "right", "threshold": 1.0}, "generate.threshold goes with keep: above or best"),
        ({"reward": "exact_mach"}, "which is no reward of the recipe, did you mean exact_match?"),
        ({"keeep": "all"}, "unknown key generate.keeep: did you mean generate.keep?"),
        ({"server": {"base_url": "http://x/v1"}}, "generate.server.model is missing"),
        ({"server": {"base_url": "ftp://x/v1", "model": "m"}}, "the URL must begin with http://"),
        ({"server": {"base_url": "http://x/v1", "model": "m", "api_key_env": "NO_SUCH_KEY"}}, "NO_SUCH_KEY"),
        ({"temperature": 0}, "gives the same completion each time"),
    ],
)
def test_generate_rejects_a_section_before_it_starts(keys: dict, message: str, recipe_of: Recipes) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        api.generate(recipe_of(generate={"out": "made", **keys}))
    assert not Path("made").exists() or not (Path("made") / "rows.jsonl").exists()


def test_generate_needs_its_section_and_rewards(recipe_of: Recipes, serve: Callable[..., JsonServer]) -> None:
    with pytest.raises(InputError, match="the recipe has no generate section"):
        api.generate(recipe_of())
    with pytest.raises(InputError, match="add a rewards section, or set generate.keep to all"):
        api.generate(recipe_of(generate={"out": "made"}, rewards={}))
    server = serve(right_on_even_seeds)
    rows = api.generate(recipe_of(generate=section(server, keep="all", max_per_prompt=1), rewards={}))
    assert [row["reward"] for row in read_rows(rows)] == [None] * 6
