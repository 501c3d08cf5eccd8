"""Servers over several nodes by vLLM's own Ray: the line of recipes/README.md, on a Ray cluster of this machine.

Ray's nodes are two `ray start` on one machine. vLLM has no Ray on a CPU: a platform plugin, vLLM's own extension point,
gives its CPU platform the name of the resource that Ray counts, which is that of its CUDA platform. All else is the
real Ray and the real vLLM: placement, workers, the loading of adapters at every step.
"""

import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import httpx2
import psutil
import pytest

from tests.helpers.forks import kill_tree
from tests.vllm.test_server import (
    PROJECT,
    assert_sampled_from_the_trainers_weights,
    folder,  # noqa: F401
    run,
    write_recipe,
)

READY_SECONDS = 240
PLUGIN = """
from vllm.platforms.cpu import CpuPlatform

class RayOnCpu(CpuPlatform):
    ray_device_key = "GPU"

def register():
    return "ray_on_cpu.RayOnCpu"
"""


@cache
def why_not() -> str | None:
    """Return the reason why Ray cannot run here."""
    if "VLLM_PYTHON" not in os.environ:
        return "VLLM_PYTHON names no python with vLLM"
    find = "import importlib.util, sys; sys.exit(importlib.util.find_spec('ray') is None)"
    done = subprocess.run([os.environ["VLLM_PYTHON"], "-c", find], capture_output=True)
    return None if done.returncode == 0 else "the environment of VLLM_PYTHON has no ray: pip install ray there"


pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The environment of Ray's nodes and of the server, with the plugin."""
    (tmp_path / "ray_on_cpu.py").write_text(PLUGIN)
    info = tmp_path / "ray_on_cpu-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ray_on_cpu\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[vllm.platform_plugins]\nray_on_cpu = ray_on_cpu:register\n")
    return {
        **os.environ,
        **{"PYTHONPATH": str(tmp_path), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        **{"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"},
    }


@pytest.fixture
def cluster(tmp_path: Path, environment: dict[str, str]) -> Iterator[str]:
    """The address of a Ray cluster of two nodes with a "GPU" each."""
    address = f"127.0.0.1:{free_port()}"
    ray = [os.environ["VLLM_PYTHON"], "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", "--num-gpus=1"]
    temporary = tempfile.mkdtemp(prefix="ray-")  # a socket's path has at most 107 bytes
    head = ["--head", f"--port={address.split(':')[1]}", "--include-dashboard=false", f"--temp-dir={temporary}"]
    started: list[psutil.Process] = []
    try:
        for options in (head, [f"--address={address}"]):
            with (tmp_path / "ray.log").open("a") as log:
                process = subprocess.Popen([*ray, *options], env=environment, stdout=log, stderr=log)
            started.append(psutil.Process(process.pid))
            wait_for_nodes(address, started, tmp_path / "ray.log", environment)
        yield address
    finally:
        for process in reversed(started):
            kill_tree(process.pid)
        shutil.rmtree(temporary, ignore_errors=True)


def wait_for_nodes(address: str, started: list[psutil.Process], log: Path, environment: dict[str, str]) -> None:
    script = f"import ray; ray.init('{address}', log_to_driver=False); print(sum(n['Alive'] for n in ray.nodes()))"
    end = time.monotonic() + READY_SECONDS
    while True:
        command = [os.environ["VLLM_PYTHON"], "-c", script]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.stdout.strip().endswith(str(len(started))):
            return
        is_up = all(process.status() != psutil.STATUS_ZOMBIE for process in started)
        assert is_up and time.monotonic() < end, log.read_text()[-3000:] + done.stderr[-1000:]
        time.sleep(0.5)


def test_documented_line_serves_a_run_over_two_ray_nodes(
    folder: Path,  # noqa: F811
    tmp_path: Path,
    environment: dict[str, str],
    cluster: str,
) -> None:
    port = free_port()
    recipe = write_recipe(folder, "ray", f"http://127.0.0.1:{port}", max_steps=2)
    options = ["--tensor-parallel-size", "2", "--host", "127.0.0.1", "--port", str(port), "--print"]
    command = [sys.executable, "-m", "rekatrain", "serve-rollouts", recipe, *options]
    own = {**os.environ, "PYTHONPATH": str(PROJECT)}
    printed = subprocess.run(command, cwd=folder, env=own, capture_output=True, text=True, check=True).stdout.strip()
    line = ["env", *shlex.split(printed), "--distributed-executor-backend", "ray"]
    log = tmp_path / "server.log"
    with log.open("w") as output:
        server = subprocess.Popen(line, env={**environment, "RAY_ADDRESS": cluster}, stdout=output, stderr=output)
    try:
        end = time.monotonic() + READY_SECONDS
        while not is_ready(f"http://127.0.0.1:{port}"):
            assert server.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.5)
        workers = [process for process in psutil.process_iter(["cmdline"]) if is_worker(process)]
        assert len({process.ppid() for process in workers}) == 2  # one in each node
        metrics, rollouts = run(folder, recipe)
        assert_sampled_from_the_trainers_weights(metrics)
        assert len(rollouts) == 2 * 16
    finally:
        kill_tree(server.pid)


def is_worker(process: psutil.Process) -> bool:
    """Return True for an actor of Ray with a part of the model."""
    return "RayWorkerProc" in " ".join(process.info["cmdline"] or [])


def is_ready(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/health").status_code == 200
    except httpx2.TransportError:
        return False
