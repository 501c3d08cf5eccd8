"""Resume runs under other layouts of the optimizer, and print how far their next step is from the uninterrupted one.

    python tests/end_to_end/resharding.py [--kinds rloo-lora sft-full ...] [--folder FOLDER]

Every kind of run takes three steps in every layout. Each is then resumed after its second step in every other layout,
and the third steps are compared: weights, AdamW's moments and its count of updates, learning rates. One start of
processes makes all runs of its number of processes (launched.py). About 15 minutes on two cores.
"""

import argparse
import itertools
import json
import logging
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[2]
sys.path.insert(0, str(PROJECT))

from tests.conftest import tiny_llama, tiny_tokenizer  # noqa: E402
from tests.end_to_end.small_runs import LORA, records, rloo_recipe, write_data, write_recipe  # noqa: E402
from tests.helpers.forks import Launch, start_forked  # noqa: E402

LAUNCHED = Path(__file__).with_name("launched.py")
ROWS = 6  # rows, or prompts, of a step; it divides by the numbers of processes
# Number of processes and stage of ZeRO; 0 is one process, or data parallelism.
LAYOUTS = {
    "one": (1, 0),
    "ddp x 2": (2, 0),
    "ZeRO-1 x 2": (2, 1),
    "ZeRO-2 x 3": (3, 2),
    "ZeRO-3 x 2": (2, 3),
    "ZeRO-3 x 3": (3, 3),  # with padding: no parameter has a multiple of 3 elements
}
BF16 = {"dtype": "bfloat16", "bf16": True}
KINDS: dict[str, dict[str, Any]] = {
    "rloo-full": {},
    "rloo-lora": {"lora": LORA},
    "rloo-lora-bf16": {"lora": LORA, **BF16},
    "sft-full": {"weight_decay": 0.1},
    "sft-lora": {"lora": LORA},
    "sft-lora-bf16": {"lora": LORA, **BF16},
}


def environment(zero: int) -> dict[str, str]:
    """Return the variables that the launch file of a stage of ZeRO sets."""
    return {
        "ACCELERATE_USE_DEEPSPEED": str(zero > 0).lower(),
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(zero),
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": str(zero == 3).lower(),
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    }


def command(folder: Path, name: str, model: Path, kind: str, num_processes: int) -> list[str]:
    """Write a recipe of three steps, which take the same rows on any number of processes; return its command line."""
    options = KINDS[kind]
    settings = {"max_steps": 3, "save_steps": 1, "learning_rate": 1e-3, "lr_scheduler_type": "cosine"}
    settings |= {key: options[key] for key in ("bf16", "weight_decay") if key in options}
    lora = options.get("lora")
    if kind.startswith("rloo"):
        recipe = rloo_recipe(folder, name, model, rloo={"prompts_per_step": ROWS, **settings}, lora=lora)
    else:
        settings |= {"per_device_train_batch_size": ROWS // num_processes, "logging_steps": 1}
        dataset = {"path": str(folder / "sft.jsonl"), "format": "prompt_answer"}
        recipe = write_recipe(folder, name, model, stage="sft", dataset=dataset, sft=settings, lora=lora)
    return ["train", str(recipe), f"model.dtype={options.get('dtype', 'float32')}"]


def copy_run(folder: Path, name: str, copy: str, step: int) -> None:
    """Copy a run as it was after `step` steps."""
    (folder / copy / "checkpoints").mkdir(parents=True)
    for file in ("metrics.jsonl", "rollouts.jsonl"):
        if (folder / name / file).exists():
            shutil.copy(folder / name / file, folder / copy)
    recipe = (folder / name / "recipe.yaml").read_text()
    (folder / copy / "recipe.yaml").write_text(recipe.replace(str(folder / name), str(folder / copy)))
    checkpoint = f"checkpoints/checkpoint-{step}"
    shutil.copytree(folder / name / checkpoint, folder / copy / checkpoint)


def launch(folder: Path, cases: Sequence[tuple[int, list[str]]], num_processes: int) -> list[str]:
    """Run command lines, each at a stage of ZeRO, on some processes; return the lines of their output."""
    path = folder / f"cases-{num_processes}.json"
    ranks = Launch(num_processes=num_processes) if num_processes > 1 else None
    # Without a launcher the environment of one process has none of its variables.
    listed = [{"environment": environment(zero) if ranks else {}, "arguments": words} for zero, words in cases]
    path.write_text(json.dumps(listed))
    process = start_forked(folder, str(LAUNCHED), str(path), launch=ranks)
    status, output = process.wait(1800), process.output()
    assert status == 0, output[-8000:]
    return output.splitlines()


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Largest relative differences of two checkpoints: over the elements of a tensor, over its largest element."""

    weights: float
    moments: float


def difference(one: Path, other: Path, keys: Mapping[str, str]) -> Difference:
    """Compare weights and moments; the counts of AdamW's updates and the names of trained parameters must be equal."""
    from rekatrain.trainer.resume.saved_optimizer import MOMENTS, WEIGHT, read_optimizer

    ours, theirs = (read_optimizer(checkpoint, keys) for checkpoint in (one, other))
    assert ours.step == theirs.step > 0
    assert set(ours.pieces[WEIGHT]) == set(theirs.pieces[WEIGHT]) == set(keys)

    def largest(*kinds: str) -> float:
        pairs = [(ours.read(kind, name), theirs.read(kind, name)) for kind in kinds for name in keys]
        return max(float((mine - its).abs().max() / mine.abs().max()) for mine, its in pairs if mine.any() or its.any())

    return Difference(weights=largest(WEIGHT), moments=largest(*MOMENTS))


def trained_keys(kind: str, model: Path) -> dict[str, str]:
    """Return the names of the trained parameters, in the order of the optimizer's groups, and their keys in files."""
    from transformers import AutoModelForCausalLM, Trainer

    from rekatrain.trainer.models.load import add_adapter
    from rekatrain.trainer.resume.resharding import keys_in_weights

    policy: Any = AutoModelForCausalLM.from_pretrained(model)
    if KINDS[kind].get("lora"):
        policy = add_adapter(policy, LORA)
    keys = keys_in_weights(policy)
    if kind.startswith("rloo"):
        return {f"policy.{name}": key for name, key in keys.items()}
    decayed = set(Trainer.get_decay_parameter_names(Any, policy))
    return dict(sorted(keys.items(), key=lambda item: item[0] not in decayed))


def in_order(layouts: Iterable[str]) -> list[str]:
    """Put data parallelism first: once a process has run under DeepSpeed, Accelerate always uses it."""
    return sorted(layouts, key=lambda layout: LAYOUTS[layout][1])


def compare(folder: Path, model: Path, kinds: Sequence[str]) -> list[tuple[str, str, str, Difference]]:
    """Make all runs, and return kind, layout of the checkpoint, layout of the next step and their difference."""
    numbers = sorted({number for number, _ in LAYOUTS.values()})
    for number in numbers:
        cases = []
        for kind, layout in itertools.product(kinds, in_order(LAYOUTS)):
            if LAYOUTS[layout][0] == number:
                cases.append((LAYOUTS[layout][1], command(folder, f"{kind} {layout}", model, kind, number)))
        launch(folder, sorted(cases, key=lambda case: case[0]), number)
        print(f"{len(cases)} runs on {number}", file=sys.stderr)
    pairs = [(kind, *pair) for kind in kinds for pair in itertools.permutations(LAYOUTS, 2)]
    for number in numbers:
        cases = []
        for kind, before, after in pairs:
            if LAYOUTS[after][0] == number:
                name = f"{kind} {before} to {after}"
                copy_run(folder, f"{kind} {before}", name, 2)
                cases.append((LAYOUTS[after][1], [*command(folder, name, model, kind, number), "--resume"]))
        launch(folder, sorted(cases, key=lambda case: case[0]), number)
        print(f"{len(cases)} resumed runs on {number}", file=sys.stderr)
    keys = {kind: trained_keys(kind, model) for kind in kinds}
    differences = []
    for kind, before, after in pairs:
        one, other = folder / f"{kind} {before}", folder / f"{kind} {before} to {after}"
        rates = [[record["learning_rate"] for record in records(run)] for run in (one, other)]
        assert rates[0] == rates[1] and len(rates[0]) == 3
        ours, theirs = (run / "checkpoints" / "checkpoint-3" for run in (one, other))
        differences.append((kind, before, after, difference(ours, theirs, keys[kind])))
    return differences


def main() -> None:
    """Print a table of all conversions."""
    logging.disable(logging.INFO)
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--folder", type=Path, help="where the runs stay; by default they are deleted")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        write_data(folder)
        model = folder / "model"
        tokenizer = tiny_tokenizer()
        tiny_llama(tokenizer).save_pretrained(model)
        tokenizer.save_pretrained(model)
        print(f"{'kind':16}{'saved by':14}{'next step by':14}{'weights':12}moments")
        for kind, before, after, largest in compare(folder, model, options.kinds):
            print(f"{kind:16}{before:14}{after:14}{largest.weights:<12.1e}{largest.moments:.1e}")


if __name__ == "__main__":
    main()
