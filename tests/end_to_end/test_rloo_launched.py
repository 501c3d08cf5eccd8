"""RLOO in real processes, data-parallel and under DeepSpeed ZeRO, takes the steps that one process takes."""

import json
import operator
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_line import LORA, OPTIONS, folder, records, rloo_recipe, start  # noqa: F401  # `folder` is a fixture

from trainer.cli import main

LAUNCHED = Path(__file__).with_name("launched.py")
# Four prompts in micro-batches of a few tokens: more of them on one process than on another, groups split among them.
FULL = {"prompts_per_step": 4, "micro_batch_tokens": 60}
KINDS = {
    "full": {"rloo": FULL},
    "adapter": {"rloo": {**OPTIONS, "prompts_per_step": 4}, "lora": LORA},
    "without-kl": {"rloo": {**FULL, "beta": 0.0, "loss_type": "token_mean"}},
}


def weights(run: Path, checkpoint: str = "checkpoints/checkpoint-3") -> dict[str, torch.Tensor]:
    [file] = (run / checkpoint).glob("*model.safetensors")
    return load_file(file)


def environment(stage: int) -> dict[str, str]:
    """What a launch file of this ZeRO stage sets, 0 for plain data parallelism."""
    return {
        "ACCELERATE_USE_DEEPSPEED": str(stage > 0).lower(),
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage),
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": str(stage == 3).lower(),
    }


def launch(folder: Path, num_processes: int, cases: list[dict]) -> None:  # noqa: F811
    (folder / "cases.json").write_text(json.dumps(cases))
    command = ["-m", "accelerate.commands.launch", "--use_deepspeed", "--zero_stage", "3", "--zero3_init_flag", "true"]
    command += ["--num_processes", str(num_processes), "--main_process_port", "0", str(LAUNCHED)]
    process = start(folder, *command, str(folder / "cases.json"))
    try:
        _, stderr = process.communicate(timeout=500)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == 0, stderr.decode()[-8000:]


def assert_same_run(one: Path, other: Path) -> None:
    by_place = operator.itemgetter("step", "slot")  # the sort is stable: a group keeps its order
    ours, theirs = (sorted(records(run, "rollouts.jsonl"), key=by_place) for run in (one, other))
    for mine, its in zip(ours, theirs, strict=True):
        assert mine["completion_ids"] == its["completion_ids"]
        assert mine["advantage"] == pytest.approx(its["advantage"], abs=1e-4)
    losses = [[line["grad_norm"] for line in records(run, "metrics.jsonl")] for run in (one, other)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    expected, found = weights(one), weights(other)
    assert expected.keys() == found.keys()
    assert all(torch.allclose(expected[name], found[name], rtol=0, atol=1e-5) for name in expected)


@pytest.mark.parametrize(("num_processes", "stages"), [(2, [1, 2, 3]), (4, [0, 3])])
def test_any_sharding_takes_the_steps_of_one_process_and_resumes(
    folder: Path,  # noqa: F811
    model_folder: Path,
    num_processes: int,
    stages: list[int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    for kind, sections in KINDS.items():
        main(["train", str(rloo_recipe(folder, kind, model_folder, **sections))])
    cases = []
    for stage in stages:
        for kind in KINDS if stage == 3 else ("full", "adapter"):
            recipe = str(rloo_recipe(folder, f"{kind}-{stage}", model_folder, **KINDS[kind]))
            cases.append({"environment": environment(stage), "arguments": ["train", recipe]})
            if kind != "without-kl":
                cases[-1]["set_aside"] = str(folder / f"{kind}-{stage}" / "checkpoints" / "checkpoint-3")
                cases.append({"environment": environment(stage), "arguments": ["train", recipe, "--resume"]})
    launch(folder, num_processes, cases)
    for case in cases:
        run = Path(case["arguments"][1]).with_suffix("")
        assert_same_run(folder / run.name.rpartition("-")[0], run)
        if "set_aside" in case:
            # Bit for bit; four processes' gradients are summed in the order in which they happen to lie in buckets.
            whole, resumed, atol = weights(run, "set-aside"), weights(run), 0.0 if num_processes == 2 else 1e-6
            assert all(torch.allclose(whole[name], resumed[name], rtol=0, atol=atol) for name in whole)

    # One process takes up the weights of several, the optimizer not unless it is told to begin anew.
    for kind in ("full", "adapter"):
        again = ["train", str(folder / f"{kind}-3.yaml"), "--resume", "rloo.max_steps=4"]
        capsys.readouterr()
        with pytest.raises(SystemExit):
            main(again)
        assert f"in {num_processes} shards of ZeRO-3" in capsys.readouterr().err
        main([*again, "rloo.restart_optimizer=true"])
        # Its rollouts are those of the run's own next step: it samples from the same weights.
        main(["train", str(folder / f"{kind}.yaml"), "--resume", "rloo.max_steps=4"])
        fourth = [
            {tuple(record["completion_ids"]) for record in records(run, "rollouts.jsonl") if record["step"] == 4}
            for run in (folder / kind, folder / f"{kind}-3")
        ]
        assert fourth[0] == fourth[1]
    main(["export", str(folder / "adapter-3"), str(folder / "exported")])
