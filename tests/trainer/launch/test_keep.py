"""keep.py: however its holder ends, and wherever descendants have gone, nothing is left."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rekatrain.trainer.launch.processes import KEEPER

# A process with a child, and a grandchild in its own session whose parent has ended.
FAMILY = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
shell = f"{sys.executable} -c 'import time; time.sleep(600)' & echo $! > {sys.argv[1]}/orphan; disown"
subprocess.run(["bash", "-c", shell], start_new_session=True)
open(sys.argv[1] + "/child", "w").write(str(child.pid))
open(sys.argv[1] + "/self", "w").write(str(os.getpid()))
time.sleep(600)
"""
# Holds a keeper as a launch does, and says where it is.
HOLDER = """
import subprocess, sys, time
keeper = subprocess.Popen([sys.executable, sys.argv[1]], stdin=subprocess.PIPE, start_new_session=True)
keeper.stdin.write(sys.argv[2].encode() + b"\\n")
keeper.stdin.flush()
open(sys.argv[3], "w").write(str(keeper.pid))
time.sleep(600)
"""


def spec(*argv: str, **changes: object) -> str:
    return json.dumps({"argv": argv, "env": {}, "unset": [], "cwd": os.getcwd(), **changes})


def keep(*argv: str, **changes: object) -> subprocess.Popen[bytes]:
    keeper = subprocess.Popen([sys.executable, str(KEEPER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert keeper.stdin is not None
    keeper.stdin.write(f"{spec(*argv, **changes)}\n".encode())
    keeper.stdin.flush()
    return keeper


def read_pid(path: Path) -> int:
    deadline = time.monotonic() + 30
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline, f"no {path.name}"
        time.sleep(0.01)
    return int(path.read_text())


def family(folder: Path) -> list[psutil.Process]:
    return [psutil.Process(read_pid(folder / name)) for name in ("self", "child", "orphan")]


def assert_ended(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert [process for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []


def test_keeper_has_the_status_output_and_environment_of_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT_B", "inherited")
    keeper = keep("sh", "-c", "echo $KEPT_A-$KEPT_B; exit 7", env={"KEPT_A": "given"}, unset=["KEPT_B"])
    assert keeper.stdout.read() == b"given-\n" and keeper.wait(timeout=30) == 7
    keeper = keep("sh", "-c", "kill -9 $$")
    assert keeper.wait(timeout=30) == 128 + 9


def test_keeper_of_a_missing_program_names_it() -> None:
    keeper = keep("/nonexistent/python")
    assert b"/nonexistent/python cannot be started: No such file" in keeper.stdout.read()
    assert keeper.wait(timeout=30) == 127


def test_keeper_hands_signals_on(tmp_path: Path) -> None:
    script = f"trap 'echo usr1; exit 5' USR1; echo x > {tmp_path}/ready; while :; do sleep 0.05; done"
    for send_to_keeper in (False, True):
        keeper = keep("bash", "-c", script)
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        (tmp_path / "ready").unlink()
        if send_to_keeper:
            keeper.send_signal(signal.SIGUSR1)
        else:
            keeper.stdin.write(f"{int(signal.SIGUSR1)}\n".encode())
            keeper.stdin.flush()
        assert keeper.wait(timeout=30) == 5


def test_kill_of_the_holder_ends_all_descendants(tmp_path: Path) -> None:
    text = spec(sys.executable, "-c", FAMILY, str(tmp_path))
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(KEEPER), text, str(tmp_path / "keeper")])
    processes = [psutil.Process(read_pid(tmp_path / "keeper")), *family(tmp_path)]
    holder.kill()
    assert_ended(processes)


def test_end_of_the_process_ends_its_descendants(tmp_path: Path) -> None:
    keeper = keep(sys.executable, "-c", FAMILY, str(tmp_path))
    processes = family(tmp_path)
    processes[0].kill()
    assert_ended(processes)
    assert keeper.wait(timeout=10) == 128 + 9


def test_kill_of_the_keeper_ends_its_process(tmp_path: Path) -> None:
    keeper = keep(sys.executable, "-c", FAMILY, str(tmp_path))
    itself, *others = family(tmp_path)
    keeper.kill()
    assert_ended([itself])
    for process in others:  # those are for the holder of the keeper, see test_supervise.py
        process.kill()
