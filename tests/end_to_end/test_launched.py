"""Tests of real launches with the shipped launch files: any sharding takes the steps of one process.

The start of processes costs more than the runs, so all runs on two processes share one launch (launched.py), and so do
all runs on four, which are forks.
"""

import json
import operator
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from rekatrain.trainer.cli import main
from tests.end_to_end.small_runs import (
    LORA,
    OPTIONS,
    PROJECT,
    records,
    rloo_recipe,
    start,
    weights,
    write_data,
    write_recipe,
)
from tests.helpers import forks
from tests.helpers.forks import start_forked

pytestmark = [pytest.mark.slow, pytest.mark.launched]

LAUNCHED = Path(__file__).with_name("launched.py")
# Four prompts in micro-batches of a few tokens: processes have different numbers of them, and groups are split.
FULL = {"prompts_per_step": 4, "micro_batch_tokens": 60}
# LoRA+ has two rates: each process moves its part of the matrices B, and of vectors, at the faster one.
PLUS = {**LORA, "loraplus_lr_ratio": 4, "modules_to_save": ["norm"]}
RLOO_KINDS: dict[str, dict[str, Any]] = {
    "full": {"rloo": FULL},
    "adapter": {"rloo": {**OPTIONS, "prompts_per_step": 4}, "lora": PLUS},
    "without-kl": {"rloo": {**FULL, "beta": 0.0, "loss_type": "token_mean"}},
    "default": {"lora": LORA},
}
TRL_KINDS = {"full": None, "lora": PLUS}


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run on several processes.

    stage, kind: stage and variant of the recipe, which one process runs too
    zero:        stage of ZeRO, 0 for data parallelism
    resumes:     True where the last checkpoint is set aside and the run resumes from the one before it
    offloads:    True where the optimizer and the parameters are on the host, as in zero3-offload.yaml
    """

    stage: str
    kind: str
    zero: int
    resumes: bool = False
    offloads: bool = False

    @property
    def alone(self) -> str:
        """Name of the same run on one process."""
        return f"{self.stage}-{self.kind}"

    @property
    def environment(self) -> dict[str, str]:
        """Variables that a launch file of this engine sets."""
        devices = {f"OFFLOAD_{part}_DEVICE": "cpu" if self.offloads else "none" for part in ("OPTIMIZER", "PARAM")}
        settings = {"ZERO_STAGE": str(self.zero), "ZERO3_INIT": str(self.zero == 3).lower(), **devices}
        return {
            "ACCELERATE_USE_DEEPSPEED": str(self.zero > 0).lower(),
            **{f"ACCELERATE_DEEPSPEED_{name}": value for name, value in settings.items()},
        }

    def name(self, num_processes: int) -> str:
        """Name of the run folder."""
        return f"{self.alone}-{self.zero}{'-offload' * self.offloads}-of-{num_processes}"


def rloo_runs(*zeros: int) -> list[Run]:
    """Runs of RLOO at each of these stages of ZeRO."""
    runs = [Run(stage="rloo", kind=kind, zero=zero, resumes=True) for zero in zeros for kind in ("full", "adapter")]
    return [*runs, Run(stage="rloo", kind="without-kl", zero=3)]


# RLOO with data parallelism comes first: once a process has run under DeepSpeed, Accelerate always uses it.
RUNS = {
    2: [
        Run(stage="rloo", kind="default", zero=0),
        *rloo_runs(1, 2, 3),
        *(Run(stage="sft", kind=kind, zero=zero, resumes=True) for kind in TRL_KINDS for zero in (1, 2, 3)),
        *(Run(stage="reward", kind=kind, zero=zero) for kind in TRL_KINDS for zero in (1, 2, 3)),
        Run(stage="sft", kind="full", zero=3, offloads=True),
        Run(stage="sft", kind="full", zero=0),
        Run(stage="reward", kind="lora", zero=0),
    ],
    4: [*rloo_runs(0, 3), *(Run(stage="sft", kind=kind, zero=zero) for kind in TRL_KINDS for zero in (2, 3))],
}


@dataclass(frozen=True, kw_only=True)
class Launch:
    """A finished launch: the folder with its runs, and the lines of its standard error."""

    folder: Path
    num_processes: int
    lines: list[str]

    def runs(self, *stages: str) -> list[tuple[Run, Path, Path]]:
        """Runs of some stages -> each run, the run folder of one process, and the run folder of several."""
        runs = [run for run in RUNS[self.num_processes] if run.stage in stages]
        return [(run, self.folder / run.alone, self.folder / run.name(self.num_processes)) for run in runs]


def recipe(folder: Path, name: str, model: Path, *, stage: str, kind: str, num_processes: int = 1) -> str:
    """Write a recipe with equal steps for any number of processes: four of four rows, or three of RLOO."""
    if stage == "rloo":
        return str(rloo_recipe(folder, name, model, **RLOO_KINDS[kind]))
    settings = {"max_steps": 4, "per_device_train_batch_size": 4 // num_processes, "learning_rate": 1e-3}
    # The norm is near 4, so every step is clipped.
    settings |= {"save_steps": 2, "logging_steps": 1, "max_grad_norm": 0.5}
    dataset = {"path": str(folder / f"{stage}.jsonl"), "format": "prompt_answer" if stage == "sft" else "preference"}
    sections = {"stage": stage, "lora": TRL_KINDS[kind], "dataset": dataset, stage: settings}
    return str(write_recipe(folder, name, model, **sections))


def launch(folder: Path, file: str, *command: str) -> subprocess.Popen[bytes]:
    """Start `accelerate launch` of two processes with a shipped launch file."""
    launcher = ["-m", "accelerate.commands.launch", "--num_processes", "2"]
    return start(folder, *launcher, "--config_file", str(PROJECT / "recipes" / "accelerate" / file), *command)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Working folder of this file, with rows, pairs and a user's reward."""
    folder = tmp_path_factory.mktemp("launched")
    write_data(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield folder


@pytest.fixture(scope="module")
def alone(folder: Path, model_folder: Path) -> Path:
    """Working folder with every kind of run on one process; RLOO is then resumed for a fourth step."""
    for stage, kinds in (("rloo", RLOO_KINDS), ("sft", TRL_KINDS), ("reward", TRL_KINDS)):
        for kind in kinds:
            path = recipe(folder, f"{stage}-{kind}", model_folder, stage=stage, kind=kind)
            main(["train", path])
            if stage == "rloo" and kind in ("full", "adapter"):
                main(["train", path, "--resume", "rloo.max_steps=4"])
    return folder


@pytest.fixture(scope="module")
def launched(alone: Path, model_folder: Path, request: pytest.FixtureRequest) -> Launch:
    """All runs on the number of processes that is the parameter."""
    folder, num_processes = alone, request.param
    cases: list[dict] = []
    for run in RUNS[num_processes]:
        name = run.name(num_processes)
        path = recipe(folder, name, model_folder, stage=run.stage, kind=run.kind, num_processes=num_processes)
        case = {"environment": run.environment, "arguments": ["train", path]}
        if run.resumes:
            last = 3 if run.stage == "rloo" else 4
            cases.append({**case, "set_aside": str(folder / name / "checkpoints" / f"checkpoint-{last}")})
            case["arguments"] = ["train", path, "--resume"]
        cases.append(case)
    loaded = recipe(folder, "loaded", model_folder, stage="sft", kind="full", num_processes=num_processes)
    sharded = Run(stage="sft", kind="full", zero=3).environment
    cases.append({"environment": sharded, "load": loaded, "report": str(folder / f"held-of-{num_processes}")})
    (folder / "cases.json").write_text(json.dumps(cases))
    command = [str(LAUNCHED), str(folder / "cases.json")]
    if num_processes == 2:
        process = launch(folder, "zero3.yaml", *command)
        output = process.communicate(timeout=900)[1].decode()
        status = process.returncode
    else:
        forked = start_forked(folder, *command, launch=forks.Launch(num_processes=num_processes))
        status, output = forked.wait(900), forked.output()
    assert status == 0, output[-8000:]
    return Launch(folder=folder, num_processes=num_processes, lines=output.splitlines())


in_two_and_four = pytest.mark.parametrize("launched", RUNS, indirect=True)


@in_two_and_four
def test_launch_logs_the_engine_of_each_run(launched: Launch) -> None:
    logged = iter([line for line in launched.lines if line.startswith("engine: ")])
    for run in RUNS[launched.num_processes]:
        engine = f"DeepSpeed ZeRO-{run.zero}" if run.zero else "data parallel"
        if run.offloads:
            engine += ", optimizer offloaded to cpu, param offloaded to cpu"
        has = "weights float32, arithmetic the weights'; attention "
        has += "rekatrain_groups" if run.stage == "rloo" else "sdpa"
        for _ in range(1 + run.resumes):
            assert next(logged) == f"engine: {engine}; world size {launched.num_processes}, cpu; {has}"
    assert list(logged) == []


@in_two_and_four
def test_rloo_on_many_processes_equals_one_and_resumes(launched: Launch) -> None:
    for run, one, many in launched.runs("rloo"):
        by_index = operator.itemgetter("step", "prompt_index")  # the sort is stable: a group keeps its order
        ours, theirs = (
            sorted((record for record in records(path, "rollouts.jsonl") if record["step"] <= 3), key=by_index)
            for path in (one, many)
        )
        assert theirs[-1]["step"] == 3
        for mine, its in zip(ours, theirs, strict=True):
            assert mine["completion_ids"] == its["completion_ids"]
            assert mine["advantage"] == pytest.approx(its["advantage"], abs=1e-5)
        norms = [[line["grad_norm"] for line in records(path) if line["step"] <= 3] for path in (one, many)]
        assert norms[0] == pytest.approx(norms[1], rel=1e-4)
        assert_close(weights(one, 3), weights(many, 3), atol=1e-5)
        if run.resumes:
            # Bit for bit on two; the order in which the gradients of four processes are summed varies with the buckets.
            atol = 0.0 if launched.num_processes == 2 else 1e-6
            assert_close(weights(many, "set-aside"), weights(many, 3), atol=atol)


@in_two_and_four
def test_trl_stages_on_many_processes_equal_one_and_resume(launched: Launch) -> None:
    for run, one, many in launched.runs("sft", "reward"):
        assert_close(weights(one, 4), weights(many, 4), atol=1e-5)
        assert [record["step"] for record in records(many)] == [1, 2, 3, 4]
        for mine, theirs in zip(records(one), records(many), strict=True):
            assert theirs["loss"] == pytest.approx(mine["loss"], abs=1e-5)
            assert theirs["grad_norm"] == pytest.approx(mine["grad_norm"], rel=1e-5)
        before, after = weights(one, 2), weights(one, 4)
        assert max((after[name] - before[name]).abs().max() for name in after) > 1e-4  # the steps changed the weights
        if run.resumes:
            assert_close(weights(many, "set-aside"), weights(many, 4), atol=0.0)


def assert_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], *, atol: float) -> None:
    """Compare weights by name."""
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name], other[name], rtol=0, atol=atol) for name in one)


@in_two_and_four
@pytest.mark.parametrize("restarts", [False, True])
def test_resume_on_one_process_loads_the_state_of_many(launched: Launch, restarts: bool) -> None:
    for run, one, many in launched.runs("rloo"):
        if run.zero == 3 and run.resumes:
            shutil.rmtree(many / "checkpoints" / "checkpoint-4", ignore_errors=True)
            options = ["rloo.max_steps=4", f"rloo.restart_optimizer={str(restarts).lower()}"]
            main(["train", f"{many}.yaml", "--resume", *options])
            # It samples from the same weights, so its rollouts are those of the run on one process.
            fourth = [
                {tuple(record["completion_ids"]) for record in records(path, "rollouts.jsonl") if record["step"] == 4}
                for path in (one, many)
            ]
            assert fourth[0] == fourth[1] and fourth[0]
            ours, theirs = weights(one, 4), weights(many, 4)
            largest = max(float((ours[name] - theirs[name]).abs().max()) for name in ours)
            assert largest > 1e-4 if restarts else largest < 1e-5  # without its moments, AdamW makes another step


@in_two_and_four
def test_load_policy_shards_the_weights_while_it_loads(launched: Launch) -> None:
    fraction = 1 / launched.num_processes
    for rank in range(launched.num_processes):  # a little more, because shards are padded to equal sizes
        held = json.loads((launched.folder / f"held-of-{launched.num_processes}-{rank}.json").read_text())
        assert fraction <= held < 1.1 * fraction


@in_two_and_four
def test_export_takes_an_adapter_of_sharded_weights(launched: Launch, model_folder: Path) -> None:
    name = {2: "sft-lora-3-of-2/checkpoints/checkpoint-4", 4: "rloo-adapter-3-of-4/checkpoints/checkpoint-3"}
    out = launched.folder / f"exported-of-{launched.num_processes}"
    main(["export", str(launched.folder / name[launched.num_processes]), str(out)])
    assert weights(out, ".").keys() == load_file(model_folder / "model.safetensors").keys()


def test_process_failure_ends_the_run_with_one_line(folder: Path, model_folder: Path) -> None:
    path = recipe(folder, "endless", model_folder, stage="sft", kind="lora", num_processes=2)
    endless = ["sft.max_steps=1000000", "sft.save_steps=1000000"]
    process = launch(folder, "ddp.yaml", "-m", "rekatrain", "train", path, *endless)
    deadline = time.monotonic() + 300
    while not (folder / "endless" / "metrics.jsonl").exists():
        assert process.poll() is None and time.monotonic() < deadline, "the run did not start"
        time.sleep(0.1)
    _, last = sorted(psutil.Process(process.pid).children(), key=lambda child: child.pid)
    killed = time.monotonic()
    last.send_signal(signal.SIGKILL)
    stderr = process.communicate(timeout=120)[1].decode()
    assert process.returncode != 0 and time.monotonic() - killed < 60
    assert [line for line in stderr.splitlines() if line.startswith("engine: ")] == [
        "engine: data parallel; world size 2, cpu; weights float32, arithmetic the weights'; attention sdpa"
    ]
    ours = [line for line in stderr.splitlines() if line.startswith("rekatrain: ")]
    assert len(ours) == 1 and "another process died" in ours[0] and "--resume" in ours[0]
    assert "Error: [" not in stderr and "[rank0]: Traceback" not in stderr
