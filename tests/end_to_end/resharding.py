"""Resume runs under other layouts of the optimizer, and print how far their next step is from the uninterrupted one.

    python tests/end_to_end/resharding.py [--kinds rloo-lora sft-full ...] [--folder FOLDER]

Every kind of run takes three steps in every layout. Each is then resumed after its second step in every other layout,
and the third steps are compared: weights, AdamW's moments and its count of updates. One start of processes makes all
runs of its number of processes (launched.py). About 15 minutes on two cores.
"""

import argparse
import itertools
import json
import logging
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[2]
sys.path.insert(0, str(PROJECT))

from tests.conftest import tiny_llama, tiny_tokenizer  # noqa: E402
from tests.end_to_end.small_runs import LORA, rloo_recipe, start, write_data, write_recipe  # noqa: E402

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
BF16 = {"model": {"dtype": "bfloat16"}, "bf16": True}
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


def write(folder: Path, name: str, model: Path, kind: str, num_processes: int) -> str:
    """Write a recipe of three steps; each takes the same rows on any number of processes."""
    options = KINDS[kind]
    sections: dict[str, Any] = {"lora": options.get("lora")}
    if "model" in options:
        sections["model"] = {"pretrained_model_name_or_path": str(model), **options["model"]}
    settings = {"max_steps": 3, "save_steps": 1, "learning_rate": 1e-3, "lr_scheduler_type": "cosine"}
    settings |= {key: options[key] for key in ("bf16", "weight_decay") if key in options}
    if kind.startswith("rloo"):
        return str(rloo_recipe(folder, name, model, rloo={"prompts_per_step": ROWS, **settings}, **sections))
    settings |= {"per_device_train_batch_size": ROWS // num_processes, "logging_steps": 1}
    dataset = {"path": str(folder / "sft.jsonl"), "format": "prompt_answer"}
    return str(write_recipe(folder, name, model, stage="sft", dataset=dataset, sft=settings, **sections))


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
    """Run command lines, each at a stage of ZeRO, on some processes; return the lines of their standard error."""
    path = folder / f"cases-{num_processes}.json"
    path.write_text(json.dumps([{"environment": environment(zero), "arguments": command} for zero, command in cases]))
    if num_processes == 1:
        process = start(folder, "-c", ONE, str(path))
    else:
        config = str(PROJECT / "recipes" / "accelerate" / "zero3.yaml")
        launcher = ["-m", "accelerate.commands.launch", "--num_processes", str(num_processes), "--config_file", config]
        process = start(folder, *launcher, str(LAUNCHED), str(path))
    try:
        _, stderr = process.communicate(timeout=1800)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, stderr.decode()[-8000:]
    return stderr.decode().splitlines()


# Without a launcher: the environment of one process has none of its variables.
ONE = """
import json, sys
from pathlib import Path
from rekatrain.trainer.cli import main
for case in json.loads(Path(sys.argv[1]).read_text()):
    main(case["arguments"])
"""


def difference(one: Path, other: Path, names: Sequence[str]) -> float:
    """Return the largest relative difference of two checkpoints: of weights and moments, by tensor.

    It is the largest difference of a tensor's elements over the largest element of it.
    """
    from rekatrain.trainer.saved_optimizer import MOMENTS, WEIGHT, read_optimizer

    ours, theirs = (read_optimizer(checkpoint, names) for checkpoint in (one, other))
    assert ours.step == theirs.step > 0
    assert set(ours.pieces[WEIGHT]) == set(theirs.pieces[WEIGHT]) == set(names)
    pairs = [(ours.read(key, name), theirs.read(key, name)) for key in (WEIGHT, *MOMENTS) for name in names]
    return max(float((mine - its).abs().max() / mine.abs().max()) for mine, its in pairs if mine.any() or its.any())


def trained_names(kind: str, model: Path) -> list[str]:
    """Return the names of the trained parameters in the order of the optimizer's groups."""
    from transformers import AutoModelForCausalLM, Trainer

    from rekatrain.trainer.models import add_adapter

    policy: Any = AutoModelForCausalLM.from_pretrained(model)
    if KINDS[kind].get("lora"):
        policy = add_adapter(policy, LORA)
    names = [name for name, parameter in policy.named_parameters() if parameter.requires_grad]
    if kind.startswith("rloo"):
        return [f"policy.{name}" for name in names]
    decayed = Trainer.get_decay_parameter_names(Any, policy)
    return [name for name in names if name in decayed] + [name for name in names if name not in decayed]


def in_order(layouts: Iterable[str]) -> list[str]:
    """Put data parallelism first: once a process has run under DeepSpeed, Accelerate always uses it."""
    return sorted(layouts, key=lambda layout: LAYOUTS[layout][1])


def compare(folder: Path, model: Path, kinds: Sequence[str]) -> list[tuple[str, str, str, float]]:
    """Make all runs, and return kind, layout of the checkpoint, layout of the next step and largest difference."""
    numbers = sorted({number for number, _ in LAYOUTS.values()})
    for number in numbers:
        cases = []
        for kind, layout in itertools.product(kinds, in_order(LAYOUTS)):
            if LAYOUTS[layout][0] == number:
                cases.append((LAYOUTS[layout][1], ["train", write(folder, f"{kind} {layout}", model, kind, number)]))
        launch(folder, sorted(cases, key=lambda case: case[0]), number)
        print(f"{len(cases)} runs on {number}", file=sys.stderr)
    pairs = [(kind, *pair) for kind in kinds for pair in itertools.permutations(LAYOUTS, 2)]
    for number in numbers:
        cases = []
        for kind, before, after in pairs:
            if LAYOUTS[after][0] == number:
                name = f"{kind} {before} to {after}"
                copy_run(folder, f"{kind} {before}", name, 2)
                cases.append((LAYOUTS[after][1], ["train", write(folder, name, model, kind, number), "--resume"]))
        launch(folder, sorted(cases, key=lambda case: case[0]), number)
        print(f"{len(cases)} resumed runs on {number}", file=sys.stderr)
    names = {kind: trained_names(kind, model) for kind in kinds}
    return [
        (
            kind,
            before,
            after,
            difference(
                folder / f"{kind} {before}" / "checkpoints" / "checkpoint-3",
                folder / f"{kind} {before} to {after}" / "checkpoints" / "checkpoint-3",
                names[kind],
            ),
        )
        for kind, before, after in pairs
    ]


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
        print(f"{'kind':16}{'saved by':14}{'next step by':14}largest difference")
        for kind, before, after, largest in compare(folder, model, options.kinds):
            print(f"{kind:16}{before:14}{after:14}{largest:.1e}")


if __name__ == "__main__":
    main()
