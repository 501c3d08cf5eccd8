"""Every shipped recipe of CPU size trains for two steps, with a tiny model in place of the real one."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rekatrain.data.errors import InputError
from rekatrain.trainer.cli import main
from rekatrain.trainer.plan.machine import current_launch
from rekatrain.trainer.plan.memory import make_plan
from rekatrain.trainer.recipe.load import load_recipe
from rekatrain.trainer.run.checkpoints import STATE_FILE
from tests.conftest import tiny_llama
from tests.helpers.reward_models import save_decoder

FOLDER = Path(__file__).parents[2] / "recipes" / "smollm2"
RECIPES = sorted(FOLDER.glob("*.yaml"))
TRAINED = [path for path in RECIPES if path.stem != "sft-qlora"]


@pytest.fixture(scope="module")
def workspace(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, and with rows where the recipes look for them, as their scripts write them."""
    folder = tmp_path_factory.mktemp("shipped")
    model = tiny_llama(tokenizer)
    model.resize_token_embeddings(len(tokenizer))
    model.config.max_position_embeddings = 1024  # a row is long in a tokenizer of 300 ids
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [
        {"messages": [{"role": "user", "content": f"{n} + 1 ="}, {"role": "assistant", "content": str(n + 1)}]}
        for n in range(8)
    ]
    pairs = [
        {"instruction": f"{n} + 1 =", "input": "", "chosen": f"{n + 1}, dear", "rejected": str(n)} for n in range(20)
    ]
    for path, lines in (
        ("runs/quickstart/sft.jsonl", rows),
        ("runs/raft/made/rows.jsonl", rows),
        ("runs/reasoning/sft.jsonl", rows),
        ("runs/politeness/train.jsonl", pairs[:16]),
        ("runs/politeness/held_out.jsonl", pairs[16:]),
        *mixed_rows().items(),
        *multi_task_rows().items(),
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("".join(json.dumps(line) + "\n" for line in lines))
    save_decoder(folder / "runs/multi-task/reward-export", tokenizer)
    return folder


def multi_task_rows() -> dict[str, list[dict[str, Any]]]:
    """Return rows of the tasks of multi-task-rloo.yaml, by path, as make_multi_task_rows.py writes them."""
    code = [{"prompt": f"Write f{n}(x).", "answer": f"def f{n}(x): return x", "tests": [f"f{n}(1)"]} for n in range(60)]
    chats = [{"prompt": f"Hi {n}", "chosen": "Hello, dear.", "rejected": "What?"} for n in range(60)]
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi.", "reasoning_content": "Hm."}]
    return {
        "runs/multi-task/sft.jsonl": [{"messages": turns}] * 8,
        "runs/multi-task/code.jsonl": code[:30],
        "runs/multi-task/code-held-out.jsonl": code[30:],
        "runs/multi-task/chats.jsonl": chats[:30],
        "runs/multi-task/chats-held-out.jsonl": chats[30:],
    }


def mixed_rows() -> dict[str, list[dict[str, Any]]]:
    """Return rows of the four sources of mixture-sft.yaml and mixture-rloo.yaml, by path."""
    thought = [{"type": "reasoning", "value": "Hm."}, {"type": "text", "value": "Hi."}]
    turns = [{"role": "user", "content": [{"type": "text", "value": "Hi"}]}, {"role": "assistant", "content": thought}]
    return {
        "datasets/gsm8k/train.jsonl": [
            {"question": f"{n} + 1?", "answer": f"{n} + 1 = <<{n}+1={n + 1}>>{n + 1}\n#### {n + 1}"} for n in range(300)
        ],
        "datasets/oasst/en_100_tree.jsonl": [
            {"prompt": {"role": "prompter", "text": f"Hi {n}", "replies": [{"role": "assistant", "text": "Hi."}]}}
            for n in range(30)
        ],
        "datasets/reasoning_traces/reason_tool_use_demo_50.jsonl": [{"messages": turns, "tools": "[]"}] * 3,
        "datasets/reasoning_traces/sample_openrouter_outputs.json": [
            {"problem": f"{n} + 1?", "gtruth_answer": str(n + 1), "message_thinking": "Hm.", "message_content": "Yes."}
            for n in range(2)
        ],
        "datasets/mbpp/mbpp.jsonl": [
            {"text": f"Add {n}.", "code": f"def f(a):\n    return a + {n}", "test_list": [f"assert f(1) == {n + 1}"]}
            for n in range(60)
        ],
    }


def test_recipes_of_both_models_have_the_same_names() -> None:
    large = {path.stem for path in (FOLDER.parent / "reka-flash-3").glob("*.yaml")}
    same = {"sft": "sft-full", "rloo": "rloo-full", "rloo-lora": "rloo-8k"}
    # What is shown on a small model alone.
    series = ("raft-", "reasoning-", "mixture-", "multi-task-", "staleness")
    small = {same.get(path.stem, path.stem) for path in RECIPES if not path.stem.startswith(series)}
    small -= {"rloo-vllm"}  # servers sample for every 21B recipe of stage rloo
    assert small == large - {"rloo-16k", "rloo-32k"}  # a small model's completions are short in every stage
    methods = {"sft-lora", "sft-full", "sft-qlora", "reward", "rloo-full", "rloo-3.1"}
    assert large == methods | {"rloo-8k", "rloo-16k", "rloo-32k"}


@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.stem)
def test_recipe_trains_for_two_steps(path: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    stage = load_recipe(path).stage
    out = workspace / "out" / path.stem
    main(
        [
            "train",
            str(path),
            "model.pretrained_model_name_or_path=model",
            f"output_dir={out}",
            f"{stage}.max_steps=2",
            f"{stage}.save_steps=2",
        ]
    )
    state = json.loads((out / "checkpoints" / "checkpoint-2" / STATE_FILE).read_text())
    assert state["global_step"] == 2


def test_mixture_recipe_judges_each_source_by_its_rewards(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workspace)
    out = workspace / "out" / "mixture-sources"
    overrides = ["model.pretrained_model_name_or_path=model", f"output_dir={out}"]
    overrides += ["rloo.max_steps=4", "rloo.prompts_per_step=8", "rloo.max_completion_length=8"]
    main(["train", str(FOLDER / "mixture-rloo.yaml"), *overrides])
    records = [json.loads(line) for line in (out / "rollouts.jsonl").read_text().splitlines()]
    judged: dict[str, set[str]] = {}
    for record in records:
        names = {name for name, value in record["rewards"].items() if value is not None}
        judged.setdefault(record["source"], names)
        assert judged[record["source"]] == names
    assert judged == {
        "problems": {"math_answer", "reasoning_format"},
        "chats": {"reasoning_format"},
        "traces": {"math_answer", "reasoning_format"},
        "code": {"code_tests", "reasoning_format"},
    }
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {name for step in metrics for name in step if name.startswith("reward/")} >= {
        f"reward/{source}" for source in judged
    }


def test_qlora_recipe_is_rejected_without_a_gpu() -> None:
    with pytest.raises(InputError, match="needs a GPU"):
        make_plan(load_recipe(FOLDER / "sft-qlora.yaml"), current_launch())
