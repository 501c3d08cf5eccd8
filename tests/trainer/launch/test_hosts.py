"""Several nodes, with stand-ins for ssh, srun and scontrol that run everything on this machine."""

import os
import socket
from pathlib import Path

import psutil
import pytest

from rekatrain import RECIPES
from rekatrain.data.errors import InputError
from rekatrain.trainer.launch.hosts import check_hosts, check_meeting_port, find_hosts
from rekatrain.trainer.launch.output import Output
from rekatrain.trainer.launch.processes import Command
from rekatrain.trainer.launch.section import LaunchConfig
from rekatrain.trainer.launch.servers import Servers
from rekatrain.trainer.launch.supervise import Supervisor
from tests.end_to_end.small_runs import LORA, records, rloo_recipe, write_data, write_recipe
from tests.package.processes import BIN, run
from tests.vllm.fake_vllm import write_stand_in

# ssh starts a shell with another environment; a host that ends in `down` is not there.
SSH = """#!/bin/bash
while [[ $1 == -* ]]; do [[ $1 == -o ]] && shift; shift; done
echo "ssh $1" >>"$STAND_INS/log"
[[ $1 == *down ]] && { echo "ssh: connect to host $1 port 22: No route to host" >&2; exit 255; }
exec env -i HOME="$HOME" PATH=/usr/bin:/bin STAND_INS="$STAND_INS" bash -c "$2"
"""
SRUN = """#!/bin/bash
echo "srun $*" >>"$STAND_INS/log"
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
[[ $3 == bad* ]] && { echo "Invalid hostlist" >&2; exit 1; }
printf '%s\\n' $NODES
"""


@pytest.fixture
def stand_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the stand-ins, which come first in PATH, and their log."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("ssh", SSH), ("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(folder), str(BIN), os.environ["PATH"]]))
    monkeypatch.setenv("STAND_INS", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def allocation(stand_ins: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A Slurm allocation of this machine and of another name of it -> the names."""
    names = ["127.0.0.1", "127.0.0.2"]
    for name, value in {
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURMD_NODENAME": names[0],
        "NODES": " ".join(names),
    }.items():
        monkeypatch.setenv(name, value)
    return names


def test_no_hosts_is_this_machine(stand_ins: Path) -> None:
    (host,) = find_hosts(LaunchConfig())
    assert (host.address, host.prefix) == ("127.0.0.1", ())


def test_hosts_are_reached_by_ssh(stand_ins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", "/cache")
    monkeypatch.setenv("HOME_OF_SOMEBODY", "x")
    first, second = find_hosts(LaunchConfig(hosts=["localhost", "user@node2"]))
    assert (first.address, first.prefix) == (socket.gethostname(), ())
    assert second.address == "node2" and second.prefix[0] == "ssh" and second.prefix[-1] == "user@node2"
    assert second.environment["HF_HOME"] == "/cache" and "HOME_OF_SOMEBODY" not in second.environment
    check_hosts([first, second])
    assert (stand_ins / "log").read_text() == "ssh user@node2\n"


def test_slurm_allocation_is_used(stand_ins: Path, allocation: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    first, second = find_hosts(LaunchConfig())
    assert (first.address, first.prefix, second.address) == ("127.0.0.1", (), "127.0.0.2")
    assert second.prefix[0] == "srun" and {"--overlap", "--gpus-per-node=8", "--nodelist=127.0.0.2"} <= {*second.prefix}


def test_host_out_of_reach_is_one_error(stand_ins: Path) -> None:
    error = "down cannot be reached by ssh: ssh: connect to host down port 22: No route to host"
    with pytest.raises(InputError, match=error):
        check_hosts(find_hosts(LaunchConfig(hosts=["localhost", "down"])))


@pytest.mark.parametrize("others", [["b"], []])
@pytest.mark.parametrize("address", ["192.0.2.7", "host.invalid"])
def test_first_host_is_this_machine(stand_ins: Path, address: str, others: list[str]) -> None:
    with pytest.raises(InputError, match=f"^{address}, the first node, is not this machine .*: run the launch there"):
        check_hosts(find_hosts(LaunchConfig(hosts=[address, *others])))
    assert not (stand_ins / "log").exists()


def test_port_at_which_nodes_meet_is_free(allocation: list[str]) -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = busy.getsockname()[1]
        with pytest.raises(InputError, match=f"^launch.main_process_port {port} cannot be used here .Address already"):
            check_meeting_port(find_hosts(LaunchConfig()), port)
        check_meeting_port(find_hosts(LaunchConfig(hosts=["localhost"])), port)  # on one machine Accelerate finds one
    check_meeting_port(find_hosts(LaunchConfig()), port)


def test_host_without_the_folder_is_one_error(stand_ins: Path, tmp_path: Path) -> None:
    (stand_ins / "ssh").write_text("#!/bin/bash\nexit 1\n")
    with pytest.raises(InputError, match=f"b does not see the folder '{tmp_path}': all nodes need the same paths"):
        check_hosts(find_hosts(LaunchConfig(hosts=["localhost", "b"])))


def test_allocation_that_cannot_be_read_is_one_error(allocation: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "login1")
    with pytest.raises(InputError, match="this node, login1, is none of the Slurm allocation's: 127.0.0.1, 127.0.0.2"):
        find_hosts(LaunchConfig())
    monkeypatch.setenv("SLURM_JOB_NODELIST", "bad[")
    with pytest.raises(InputError, match=r"scontrol cannot expand the nodes 'bad\[': Invalid hostlist"):
        find_hosts(LaunchConfig())


@pytest.mark.parametrize("variable", ["SLURM_NNODES", "SLURM_JOB_NUM_NODES"])
@pytest.mark.parametrize("number", ["", "x", "0", "-1", "1.5"])
def test_number_of_nodes_that_is_none_is_one_error(monkeypatch: pytest.MonkeyPatch, variable: str, number: str) -> None:
    monkeypatch.setenv(variable, number)
    with pytest.raises(InputError, match=f"^{variable} is '{number}', which is no number of nodes"):
        find_hosts(LaunchConfig())
    assert len(find_hosts(LaunchConfig(hosts=["localhost"]))) == 1


def test_login_node_is_none_of_an_allocation(allocation: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURMD_NODENAME")  # as in the shell of salloc
    monkeypatch.setenv("NODES", "192.0.2.7 192.0.2.8")
    with pytest.raises(InputError, match="^192.0.2.7, the first node, is not this machine"):
        check_hosts(find_hosts(LaunchConfig()))


def test_task_of_an_srun_beside_the_first_is_one_error(allocation: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert len(find_hosts(LaunchConfig())) == 2
    monkeypatch.setenv("SLURM_PROCID", "1")
    for config in (LaunchConfig(), LaunchConfig(hosts=["localhost"])):
        with pytest.raises(InputError, match="^this is task 1 of an srun, and the launch of task 0 starts"):
            find_hosts(config)


def test_processes_on_other_nodes_end_with_the_launch(
    stand_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, host = find_hosts(LaunchConfig(hosts=["localhost", "node2"]))
    script = "echo $STAND_INS; sleep 600 & echo $! >sleeper; wait"
    remote = Command(name="trainer 1", argv=["bash", "-c", script], environment=host.environment, prefix=host.prefix)
    ends = "while [ ! -s sleeper ]; do sleep 0.05; done; exit 3"
    here = Command(name="trainer 0", argv=["bash", "-c", ends])
    output = Output([])
    servers = Servers([], output, start_timeout=1, max_restarts=0)
    supervisor = Supervisor(servers, [here, remote], output)
    monkeypatch.setattr("rekatrain.trainer.launch.supervise.TRAINER_END_SECONDS", 0.2)
    assert supervisor.run() == 3
    assert not psutil.pid_exists(int((tmp_path / "sleeper").read_text()))


@pytest.mark.slow
@pytest.mark.launched
@pytest.mark.parametrize("stage", ["sft", "rloo"])
def test_sbatch_file_trains_on_the_nodes_of_its_allocation(
    stand_ins: Path, allocation: list[str], tmp_path: Path, model_folder: Path, stage: str
) -> None:
    write_data(tmp_path)
    if stage == "sft":
        dataset = {"path": str(tmp_path / "sft.jsonl"), "format": "prompt_answer"}
        sft = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1}
        write_recipe(tmp_path, "run", model_folder, stage="sft", dataset=dataset, sft=sft)
        placed = "in_process: 1 training process (ddp.yaml)"
    else:
        python = write_stand_in(tmp_path / "python")
        rloo_recipe(tmp_path, "run", model_folder, rloo={"max_steps": 2}, launch={"vllm_python": python}, lora=LORA)
        placed = "split: 1 vLLM server, 1 training process (ddp.yaml)"
    done = run(tmp_path, "bash", RECIPES / "slurm" / "launch.sbatch", "run.yaml")
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"rekatrain: launch: 2 nodes, each with {placed}" in done.stderr
    assert "world size 2, cpu" in done.stderr
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2]
    assert "--nodelist=127.0.0.2" in (stand_ins / "log").read_text()
    if stage == "rloo":
        for server in allocation:
            assert f"rollouts: http://{server}:" in done.stderr
        assert max(record["mismatch_logprob"] for record in records(tmp_path / "run")) < 1e-4
