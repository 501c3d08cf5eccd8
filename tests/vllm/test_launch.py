"""`rekatrain launch` as a user runs it: with a stand-in for vLLM, and with the real vLLM that VLLM_PYTHON names.

However a run ends, none of its processes is left, and `--resume` goes on.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from transformers import PreTrainedTokenizerFast

from rekatrain.trainer.cli import main
from rekatrain.trainer.run.records import read_records
from tests.conftest import tiny_llama
from tests.end_to_end.small_runs import write_data
from tests.package.processes import environment
from tests.vllm.fake_vllm import write_stand_in

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
SECONDS = 300
# vLLM's CPU kernels need heads of 32.
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}

# Reads the arguments of a server as vLLM does.
PARSE = """
import sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
for line in sys.stdin:
    options = make_arg_parser(FlexibleArgumentParser()).parse_args(line.split())
    shown = options.tensor_parallel_size, options.enable_sleep_mode, options.gpu_memory_utilization
    print("parsed", *shown, options.distributed_executor_backend, options.data_parallel_backend)
"""

pytestmark = [pytest.mark.slow, pytest.mark.launched]


@pytest.fixture(
    params=[
        "stand-in",
        pytest.param(
            "vllm",
            marks=[
                pytest.mark.vllm,
                pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="VLLM_PYTHON names no python with vLLM"),
            ],
        ),
    ]
)
def python(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The Python of an environment with vLLM, or a stand-in for it."""
    if request.param == "vllm":
        return os.environ["VLLM_PYTHON"]
    return write_stand_in(tmp_path / "python")


@pytest.fixture
def folder(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, python: str) -> Path:
    """A folder with a model, its data and `run.yaml`, whose run does not end on its own."""
    write_data(tmp_path)
    model = tiny_llama(tokenizer, **SIZES)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    tree = {
        "stage": "rloo",
        "output_dir": "run",
        "seed": 3,
        "model": {"pretrained_model_name_or_path": "model", "dtype": "float32"},
        "lora": LORA,
        "dataset": {"path": "sums.jsonl", "format": "prompt_answer"},
        "rewards": {"my_rewards:letters": {"weight": 1.0}},
        "rloo": {
            **{"max_steps": 100_000, "prompts_per_step": 2, "num_generations": 4, "max_completion_length": 12},
            **{"beta": 0.1, "learning_rate": 1e-3, "save_steps": 2, "save_total_limit": 2},
        },
        "launch": {"vllm_python": python},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(tree))
    return tmp_path


def command_of(process: psutil.Process) -> str:
    """Return the command of a process; of one that has ended, nothing."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


class Launch:
    """A running `rekatrain launch run.yaml`, and all processes that it has had."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.folder, self.log = folder, folder / f"log-{len(list(folder.glob('log-*')))}"
        self.seen: dict[int, psutil.Process] = {}
        self.started = time.time()
        command = [sys.executable, "-m", "rekatrain", "launch", "run.yaml", *arguments]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=folder, env=environment(), stderr=log, stdout=log)

    def descendants(self, pattern: str = "") -> list[psutil.Process]:
        """Return the processes of the launch whose command matches."""
        found = psutil.Process(self.process.pid).children(recursive=True)
        self.seen |= {process.pid: process for process in found}
        return [process for process in found if re.search(pattern, command_of(process))]

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + SECONDS
        while not condition():
            assert self.process.poll() is None, self.output()
            assert time.monotonic() < deadline, self.output()
            self.descendants()
            time.sleep(0.05)

    def num_steps(self) -> int:
        """Return the number of steps that this launch has recorded, beside those of earlier ones."""
        metrics = self.folder / "run" / "metrics.jsonl"
        return sum(record["time"] > self.started for record in read_records(metrics)) if metrics.exists() else 0

    def wait_for_steps(self, number: int) -> None:
        """Wait for so many further steps of this launch."""
        before = self.num_steps()
        self.wait_until(lambda: self.num_steps() >= before + number)

    def kill(self, pattern: str) -> None:
        """Kill the processes of the launch whose command matches, of which there is one at least."""
        found = self.descendants(pattern)
        assert found, self.output()
        for process in found:
            with suppress(psutil.NoSuchProcess):  # it ends with the one that was killed before it
                process.kill()

    def end(self) -> int:
        """Wait for the end -> the exit status; no process of the launch is left."""
        status = self.process.wait(timeout=SECONDS)
        _, alive = psutil.wait_procs(self.seen.values(), timeout=20)
        assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
        return status

    def output(self) -> str:
        return self.log.read_text()[-4000:]


def test_run_survives_the_death_of_each_of_its_processes(folder: Path) -> None:
    launch = Launch(folder)
    launch.wait_for_steps(3)
    assert len(launch.descendants("EngineCore")) == 1
    launch.process.kill()
    assert launch.end() == -signal.SIGKILL

    launch = Launch(folder, "--resume")
    launch.wait_for_steps(1)
    launch.kill("vllm.entrypoints|fake_vllm")
    launch.wait_until(lambda: "restart 1 of 3" in launch.log.read_text())
    assert "server died with status 137" in launch.log.read_text()
    launch.wait_for_steps(3)  # of which the first may have its completions from before
    launch.kill("rekatrain train run.yaml")
    assert launch.end() not in (0, 75)

    launch = Launch(folder, "--resume")
    launch.wait_for_steps(1)
    launch.process.send_signal(signal.SIGTERM)
    assert launch.end() == 75, launch.output()
    assert "[trainer] rekatrain: interrupted by SIGTERM after step" in launch.log.read_text()

    last = read_records(folder / "run" / "metrics.jsonl")[-1]["step"] + 2
    launch = Launch(folder, "--resume", f"rloo.max_steps={last}")
    assert launch.end() == 0, launch.output()
    metrics = read_records(folder / "run" / "metrics.jsonl")
    assert [record["step"] for record in metrics] == list(range(1, last + 1))
    assert max(record["mismatch_logprob"] for record in metrics) < 1e-4


@pytest.mark.vllm
@pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="VLLM_PYTHON names no python with vLLM")
@pytest.mark.parametrize("python", ["vllm"], indirect=True)
def test_vllm_accepts_the_servers_of_each_placement(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def servers(*arguments: str) -> list[str]:
        with pytest.raises(SystemExit):  # at the end: there is no GPU
            main(["launch", "run.yaml", "--dry-run", "launch.gpus=4", *arguments])
        lines = [line for line in capsys.readouterr().out.splitlines() if "api_server" in line]
        return [line.partition("api_server ")[2] for line in lines]

    os.chdir(folder)
    split = servers("launch.placement=split", "launch.servers=2", "launch.server_options={max_num_seqs: 64}")
    shared = servers("launch.placement=shared", "launch.gpus=2", "launch.gpu_memory_utilization=0.4")
    assert (len(split), len(shared)) == (2, 1)
    main(["serve-rollouts", "run.yaml", "--tensor-parallel-size", "16", "--host", "node1", "--print"])
    ray = capsys.readouterr().out.strip().partition("api_server ")[2] + " --distributed-executor-backend ray"
    copies = ray + " --data-parallel-size 8 --data-parallel-backend ray"
    command = [os.environ["VLLM_PYTHON"], "-c", PARSE]
    lines = "\n".join([*split, *shared, ray, copies])
    done = subprocess.run(command, input=lines, capture_output=True, text=True)
    parsed = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("parsed")]
    assert parsed == [
        *[["1", "False", "0.92", "None", "mp"]] * 2,
        ["2", "True", "0.4", "None", "mp"],
        ["16", "False", "0.92", "ray", "mp"],
        ["16", "False", "0.92", "ray", "ray"],
    ], done.stderr[-2000:]
