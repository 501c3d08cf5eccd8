"""The sbatch files, without Slurm: a stand-in runs their body here, and a requeued job resumes and finishes its run."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.small_runs import PROJECT, records, rloo_recipe, write_data
from tests.package.processes import BIN, environment

SLURM = PROJECT / "recipes" / "slurm"
# srun: one task per node, all of them here; its status is the highest of a task.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
pids=()
for ((node = 0; node < SLURM_NNODES; node++)); do
    SLURM_NODEID=$node "$@" &
    pids+=($!)
done
echo "${pids[@]}" >tasks
highest=0
for pid in "${pids[@]}"; do
    wait "$pid"
    status=$?
    ((status > highest)) && highest=$status
done
exit "$highest"
"""
SCONTROL = """#!/bin/bash
case "$1" in
show) echo 127.0.0.1 ;;
requeue) echo "$2" >>requeued ;;
esac
"""


@pytest.fixture
def cluster(tmp_path: Path, model_folder: Path) -> Path:
    """A folder with a recipe, and with `srun` and `scontrol` in `bin`."""
    write_data(tmp_path)
    rloo_recipe(tmp_path, "run", model_folder, rloo={"max_steps": 12, "save_steps": 100})
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def submit(cluster: Path, name: str, num_nodes: int, gpus: int, restarts: int) -> subprocess.Popen[str]:
    """Start the body of an sbatch file, as Slurm does on the first node of a job."""
    path = os.pathsep.join([str(cluster / "bin"), str(BIN), os.environ["PATH"]])
    launch_file = "ddp" if num_nodes == 1 else "two-nodes"
    settings = {
        "PATH": path,
        "GPUS": str(gpus),
        "LAUNCH_FILE": str(PROJECT / "recipes" / "accelerate" / f"{launch_file}.yaml"),
        "SLURM_JOB_ID": str(10_000 + os.getpid()),
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_NNODES": str(num_nodes),
        "SLURM_RESTART_COUNT": str(restarts),
        "HF_HUB_OFFLINE": "1",
    }
    command = ["bash", str(SLURM / f"{name}.sbatch"), "run.yaml", "rloo.beta=0.2"]
    options = {"cwd": cluster, "env": environment() | settings, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, **options)


@pytest.mark.slow
@pytest.mark.launched
@pytest.mark.parametrize(("name", "num_nodes", "gpus"), [("one-node", 1, 2), ("several-nodes", 2, 1)])
def test_slurm_job_is_requeued_and_resumes(cluster: Path, name: str, num_nodes: int, gpus: int) -> None:
    job = submit(cluster, name, num_nodes, gpus, restarts=0)
    deadline = time.monotonic() + 300
    while not (cluster / "run" / "metrics.jsonl").exists():
        assert job.poll() is None and time.monotonic() < deadline, "the run did not start"
        time.sleep(0.05)
    tasks = [psutil.Process(int(pid)) for pid in (cluster / "tasks").read_text().split()]
    ranks = [child for task in tasks for child in task.children()]
    for task in tasks:  # as --signal does
        task.send_signal(signal.SIGUSR1)
    stderr = job.communicate(timeout=120)[1]
    assert job.returncode == 75, stderr[-4000:]
    ours = [line for line in stderr.splitlines() if line.startswith("rekatrain: ")]
    assert len(ours) == 1 and ours[0].startswith("rekatrain: interrupted by SIGUSR1 after step ")
    assert "Traceback" not in stderr and len(ranks) == 2 and not any(rank.is_running() for rank in ranks)
    assert len((cluster / "requeued").read_text().split()) == 1

    job = submit(cluster, name, num_nodes, gpus, restarts=1)
    stderr = job.communicate(timeout=300)[1]
    assert job.returncode == 0, stderr[-4000:]
    assert [record["step"] for record in records(cluster / "run")] == list(range(1, 13))
    assert len((cluster / "requeued").read_text().split()) == 1


@pytest.mark.parametrize("path", sorted(SLURM.iterdir()), ids=lambda path: path.stem)
def test_slurm_files_are_valid_shell_and_resume(path: Path) -> None:
    assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
    if shutil.which("shellcheck"):
        assert subprocess.run(["shellcheck", str(path)]).returncode == 0
    text = path.read_text()
    options = [line.removeprefix("#SBATCH --").split("=")[0] for line in text.splitlines() if "#SBATCH" in line]
    assert {"signal", "requeue", "open-mode", "time"} <= set(options)
    assert '"$@" --resume' in text


def test_dockerfile_has_the_tested_versions() -> None:
    text = (PROJECT / "recipes" / "docker" / "Dockerfile").read_text()
    constraints = (PROJECT / "tests" / "constraints.txt").read_text()
    (base,) = [line for line in text.splitlines() if line.startswith("FROM ")]
    version = base.removeprefix("FROM python:").split("-")[0]
    assert f"(Python {version})" in constraints.splitlines()[0]
    assert f'"Programming Language :: Python :: {version}"' in (PROJECT / "pyproject.toml").read_text()
    assert "--constraint tests/constraints.txt" in text and "torch==" in constraints
    assert "==" not in text  # no further pin, which could differ
