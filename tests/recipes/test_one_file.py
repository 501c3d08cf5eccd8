"""RLOO in one file learns what the engine learns: equal advantages and gradients on the same completions."""

import copy
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rekatrain.trainer.rloo import loss
from tests.helpers.rloo import TEXTS, assert_gradients_close, gradient_of, make_setup, perturb, reference_of, run_step

SCRIPT = Path(__file__).parents[2] / "recipes" / "one_file" / "rloo.py"


@pytest.fixture
def one_file() -> ModuleType:
    """The script as a module, with settings for a tiny model."""
    spec = importlib.util.spec_from_file_location("one_file_rloo", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.NUM_GENERATIONS, module.MAX_NEW_TOKENS, module.TEMPERATURE, module.BETA = 4, 8, 0.8, 0.1
    return module


def test_leave_one_out_advantages_equal_the_engine(one_file: ModuleType) -> None:
    rewards_PG = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.3, -2.0, 0.7, 0.7], [1.0, 1.0, 1.0, 1.0]])
    expected = loss.leave_one_out_advantages(rewards_PG)
    for rewards_G, advantages_G in zip(rewards_PG, expected, strict=True):
        torch.testing.assert_close(one_file.leave_one_out_advantages(rewards_G), advantages_G)


@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_take_step_gradient_equals_the_engine(
    one_file: ModuleType,
    policy: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    beta: float,
) -> None:
    one_file.BETA = beta
    task = make_setup(tokenizer, beta=beta, num_generations=4, temperature=one_file.TEMPERATURE)
    start = copy.deepcopy(policy)
    reference = reference_of(start, task) if beta else None
    perturb(policy)  # away from the reference, so that there is a KL
    records, expected = run_step(policy, task, reference)
    groups = {text: [record for record in records if record["prompt"] == text] for text in TEXTS}
    assert len({len(record["completion_ids"]) for record in records}) > 1  # there is padding to leave out

    scores = iter([record["reward"] for text in TEXTS for record in groups[text]])
    monkeypatch.setattr(one_file, "reward", lambda completion, answer: next(scores))
    prompts = {tuple(one_file.encode_prompt(text, tokenizer)): text for text in TEXTS}
    completions = {text: [record["completion_ids"] for record in group] for text, group in groups.items()}
    monkeypatch.setattr(one_file, "sample", lambda model, tokenizer, prompt: completions[prompts[tuple(prompt)]])
    seen = []
    advantages_of = one_file.leave_one_out_advantages
    monkeypatch.setattr(
        one_file, "leave_one_out_advantages", lambda rewards_G: seen.append(advantages_of(rewards_G)) or seen[-1]
    )

    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)  # leaves weights and gradient as they are
    rows = [{"prompt": text, "answer": ""} for text in TEXTS]
    metrics = one_file.take_step(policy, start, tokenizer, optimizer, rows)

    assert_gradients_close(gradient_of(policy), expected)
    advantages = [record["advantage"] for text in TEXTS for record in groups[text]]
    torch.testing.assert_close(torch.cat(seen), torch.tensor(advantages), rtol=1e-4, atol=1e-5)
    assert metrics["reward"] == pytest.approx(sum(record["reward"] for record in records) / len(records))
    if beta:
        assert metrics["kl"] == pytest.approx(sum(record["kl"] for record in records) / len(records), rel=1e-3)


def test_sample_draws_from_the_scored_distribution(
    one_file: ModuleType, policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    one_file.NUM_GENERATIONS, one_file.MAX_NEW_TOKENS = 4000, 1
    prompt = one_file.encode_prompt(TEXTS[0], tokenizer)
    torch.manual_seed(0)
    drawn = torch.tensor(one_file.sample(policy, tokenizer, prompt))[:, 0].bincount(minlength=len(tokenizer))
    every_token = [[token] for token in range(len(tokenizer))]
    probabilities = one_file.sequence_logprobs(policy, tokenizer, prompt, every_token).exp()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-4)
    assert (drawn / 4000 - probabilities).abs().max().item() < 0.05


def test_sample_stops_at_eos_and_at_the_stop_text(
    one_file: ModuleType, policy: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    one_file.NUM_GENERATIONS, one_file.MAX_NEW_TOKENS = 32, 12
    torch.manual_seed(0)
    completions = one_file.sample(policy, tokenizer, one_file.encode_prompt(TEXTS[0], tokenizer))
    assert any(ids[-1] == tokenizer.eos_token_id for ids in completions)
    for ids in completions:
        assert tokenizer.eos_token_id not in ids[:-1]
        assert len(ids) == 12 or one_file.is_end(ids, tokenizer)
    stop = tokenizer("4 <sep>", add_special_tokens=False)["input_ids"]
    assert [one_file.is_end(stop[:end], tokenizer) for end in (len(stop) - 1, len(stop))] == [False, True]


def test_script_trains_for_two_steps(model_folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{n} + {n} =", "answer": 2 * n}) + "\n" for n in range(8)))
    command = [sys.executable, str(SCRIPT), str(model_folder), "--prompts", str(prompts), "--steps", "2"]
    finished = subprocess.run(
        [*command, "--out", str(tmp_path / "out")], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert finished.returncode == 0, finished.stderr
    lines = [line for line in finished.stdout.splitlines() if line.startswith("step")]  # libraries print lines too
    assert [line.split("  ")[0] for line in lines] == ["step 1/2", "step 2/2"]
    assert "kl 0.000" in lines[0]  # the policy is still the reference
    before, after = (
        LlamaForCausalLM.from_pretrained(folder).state_dict() for folder in (model_folder, tmp_path / "out")
    )
    assert any(not torch.equal(before[name], after[name]) for name in before)
