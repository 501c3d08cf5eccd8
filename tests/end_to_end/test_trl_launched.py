"""Real launches with the shipped launch files: ZeRO takes the steps of one process, and a dead process ends a run."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from trainer.cli import main

PROJECT = Path(__file__).parents[2]
LAUNCHED = Path(__file__).with_name("launched.py")
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
NO_DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "false"}
KINDS = {"full": None, "lora": LORA}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with rows for SFT and pairs for a reward model."""
    rows = [{"prompt": f"{n} + {n} =", "answer": 2 * n, "reasoning": f"Twice {n}."} for n in range(1, 13)]
    pairs = [{"prompt": f"{n} + {n} =", "chosen": f"{2 * n}", "rejected": f"{n}, no"} for n in range(1, 13)]
    for name, content in (("sft", rows), ("reward", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def write_recipe(folder: Path, name: str, model: Path, *, stage: str, kind: str, num_processes: int) -> str:
    """A recipe of four steps of four rows, however many processes share them."""
    settings = {"max_steps": 4, "per_device_train_batch_size": 4 // num_processes, "learning_rate": 1e-3}
    settings |= {"save_steps": 2, "logging_steps": 1, "max_grad_norm": 0.5}  # the norm is near 4: every step is clipped
    tree = {
        "stage": stage,
        "output_dir": str(folder / name),
        "seed": 3,
        "model": {"pretrained_model_name_or_path": str(model), "dtype": "float32"},
        "lora": KINDS[kind],
        "dataset": {"path": f"{stage}.jsonl", "format": "prompt_answer" if stage == "sft" else "preference"},
        stage: settings,
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(tree))
    return str(path)


def launch(folder: Path, file: str, *command: str, num_processes: int = 2) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(num_processes)]
    launcher += ["--config_file", str(PROJECT / "recipes" / "accelerate" / file)]
    return subprocess.Popen([*launcher, *command], cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    (file,) = checkpoint.glob("*model.safetensors")
    return load_file(file)


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(one: Path, run: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The same losses and the same weights in the end, which are given back."""
    expected, found = (weights(path / "checkpoints" / "checkpoint-4") for path in (one, run))
    assert expected.keys() == found.keys()
    assert all(torch.allclose(expected[name], found[name], rtol=0, atol=1e-5) for name in expected), run
    assert [r["step"] for r in records(run)] == [1, 2, 3, 4]
    for mine, theirs in zip(records(one), records(run), strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], abs=1e-5)
        assert theirs["grad_norm"] == pytest.approx(mine["grad_norm"], rel=1e-5)
    return expected, found


def test_every_engine_takes_the_steps_of_one_process_and_resumes_bit_for_bit(folder: Path, model_folder: Path) -> None:
    every: list[tuple[str, str, int | str]] = [
        (stage, kind, zero) for stage in ("sft", "reward") for kind in KINDS for zero in (1, 2, 3)
    ]
    cases = []
    for stage, kind, zero in every:
        name = f"{stage}-{kind}-{zero}"
        recipe = write_recipe(folder, name, model_folder, stage=stage, kind=kind, num_processes=2)
        environment = {
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(zero),
            "ACCELERATE_DEEPSPEED_ZERO3_INIT": str(zero == 3).lower(),
        }
        case = {"environment": environment, "arguments": ["train", recipe]}
        if stage == "sft":
            cases.append({**case, "set_aside": str(folder / name / "checkpoints" / "checkpoint-4")})
            cases.append({**case, "arguments": ["train", recipe, "--resume"]})
        else:
            cases.append(case)
    # The last case is of stage 3: what is loaded next is sharded as it is loaded.
    loaded = write_recipe(folder, "loaded", model_folder, stage="sft", kind="full", num_processes=2)
    cases.append({"environment": environment, "load": loaded, "report": str(folder / "held")})
    # With the optimizer in the host's memory, as zero3-offload.yaml has it; and, at last, without DeepSpeed.
    offload = {f"ACCELERATE_DEEPSPEED_OFFLOAD_{part}_DEVICE": "cpu" for part in ("OPTIMIZER", "PARAM")}
    others = [("sft", "full", "offload", environment | offload)]
    others += [("sft", "full", "ddp", NO_DEEPSPEED), ("reward", "lora", "ddp", NO_DEEPSPEED)]
    for stage, kind, engine, environment in others:
        name = f"{stage}-{kind}-{engine}"
        recipe = write_recipe(folder, name, model_folder, stage=stage, kind=kind, num_processes=2)
        cases.append({"environment": environment, "arguments": ["train", recipe]})
        every.append((stage, kind, engine))
    (folder / "cases.json").write_text(json.dumps(cases))
    process = launch(folder, "zero3.yaml", str(LAUNCHED), str(folder / "cases.json"))
    for stage in ("sft", "reward"):
        for kind in KINDS:
            name = f"{stage}-{kind}"
            main(["train", write_recipe(folder, name, model_folder, stage=stage, kind=kind, num_processes=1)])
    _, stderr = process.communicate(timeout=500)
    assert process.returncode == 0, stderr

    told = [line for line in stderr.splitlines() if line.startswith("engine: ")]
    stages = [case["environment"].get("ACCELERATE_DEEPSPEED_ZERO_STAGE") for case in cases if "arguments" in case]
    assert [line.split(";")[0].split(",")[0] for line in told] == [
        f"engine: DeepSpeed ZeRO-{stage}" if stage else "engine: data parallel" for stage in stages
    ]
    assert all("world size 2" in line and "weights float32" in line and "attention sdpa" in line for line in told)
    assert "optimizer offloaded to cpu, param offloaded to cpu" in told[-3]

    for stage, kind, zero in every:
        one, run = folder / f"{stage}-{kind}", folder / f"{stage}-{kind}-{zero}"
        expected, found = assert_same_run(one, run)
        before = weights(one / "checkpoints" / "checkpoint-2")
        assert max((expected[name] - before[name]).abs().max() for name in expected) > 1e-4  # it was no idle step
        if (run / "set-aside").exists():
            uninterrupted = weights(run / "set-aside")
            assert all(torch.equal(found[name], uninterrupted[name]) for name in found)
    for rank in (0, 1):  # a little more than half: what does not divide by two is padded
        assert 0.5 <= json.loads((folder / f"held-{rank}.json").read_text()) < 0.55
    main(["export", str(folder / "sft-lora-3"), str(folder / "export")])
    assert weights(folder / "export").keys() == load_file(model_folder / "model.safetensors").keys()


def test_four_processes_take_the_steps_of_one(folder: Path, model_folder: Path) -> None:
    engines = [(kind, zero) for kind in KINDS for zero in (2, 3)]
    cases = []
    for kind, zero in engines:
        environment = {
            "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(zero),
            "ACCELERATE_DEEPSPEED_ZERO3_INIT": str(zero == 3).lower(),
        }
        recipe = write_recipe(folder, f"{kind}-{zero}", model_folder, stage="sft", kind=kind, num_processes=4)
        cases.append({"environment": environment, "arguments": ["train", recipe]})
    (folder / "cases.json").write_text(json.dumps(cases))
    process = launch(folder, "zero3.yaml", str(LAUNCHED), str(folder / "cases.json"), num_processes=4)
    for kind in KINDS:
        main(["train", write_recipe(folder, kind, model_folder, stage="sft", kind=kind, num_processes=1)])
    _, stderr = process.communicate(timeout=500)
    assert process.returncode == 0, stderr
    for kind, zero in engines:
        assert_same_run(folder / kind, folder / f"{kind}-{zero}")


def test_a_process_that_dies_ends_the_run_with_one_line(folder: Path, model_folder: Path) -> None:
    recipe = write_recipe(folder, "run", model_folder, stage="sft", kind="lora", num_processes=2)
    endless = ["sft.max_steps=1000000", "sft.save_steps=1000000"]
    process = launch(folder, "ddp.yaml", "-m", "trainer", "train", recipe, *endless)
    deadline = time.monotonic() + 300
    while not (folder / "run" / "metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < deadline, "the run did not start"
        time.sleep(0.1)
    _, last = sorted(psutil.Process(process.pid).children(), key=lambda child: child.pid)
    killed = time.monotonic()
    last.send_signal(signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0 and time.monotonic() - killed < 60
    assert [line for line in stderr.splitlines() if line.startswith("engine: ")] == [
        "engine: data parallel; world size 2, cpu; weights float32, arithmetic the weights'; attention sdpa"
    ]
    ours = [line for line in stderr.splitlines() if "rekatrain" in line]
    assert len(ours) == 1 and "another process of it died" in ours[0] and "--resume" in ours[0]
    assert "Error: [" not in stderr and "[rank0]: Traceback" not in stderr
