"""Kill a judge and a reward server for minutes in the middle of an RLOO run: it waits, and loses no step.

    python -m tests.rewards.models.outage --seconds 120

Two runs of the tiny model by the same recipe, with a judge, a remote reward model and a rule. During the second,
SIGKILL ends both servers after its second step, and they start again after --seconds. Prints how long the step waited.
Exits with 1 if the rewards of any step differ, or if a completion had an error. test_outage.py has a short form.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rekatrain.trainer.api import train
from tests.end_to_end.small_runs import records, rloo_recipe, write_data

NUM_STEPS, KILLED_AFTER = 5, 2
# A reward server for route http, and a judge: both count the letters of an answer.
SERVER = """
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(404)
        self.end_headers()

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if "answers" in body:
            reply = {"scores": [sum(map(str.isalpha, answer)) / 20 for answer in body["answers"]]}
        else:
            score = 1 + sum(map(str.isalpha, body["messages"][-1]["content"])) % 10
            reply = {"choices": [{"message": {"content": json.dumps({"score": score})}, "finish_reason": "stop"}]}
        data = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


ThreadingHTTPServer.allow_reuse_address = True
ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


class Server:
    """A server in a process, which can be killed and started again on its port."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, and wait until it listens."""
        self.process = subprocess.Popen([sys.executable, "-S", "-c", SERVER, str(self.port)])
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with socket.socket() as connection:
                if connection.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise AssertionError("the server does not start")

    def kill(self) -> None:
        """End it by SIGKILL."""
        if self.process is not None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()


@dataclass(frozen=True, kw_only=True)
class Result:
    """Rewards and errors by step of both runs, and the seconds between the end of the servers and the next step."""

    rewards: list[list[float]]
    errors: list[float]
    waited: float


def kill_in_mid_run(folder: Path, model: Path, seconds: float) -> Result:
    """Train twice in `folder`, the current one; the servers of the second run are away for `seconds`."""
    write_data(folder)
    servers = [Server(), Server()]
    path = _write_recipe(folder, model, servers, outage_minutes=1 + seconds / 30)
    metrics = folder / "run" / "metrics.jsonl"
    times: dict[str, float] = {}

    def disturb() -> None:
        _wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= KILLED_AFTER)
        for server in servers:
            server.kill()
        times["killed"] = time.monotonic()
        num_steps = metrics.read_text().count("\n")
        time.sleep(seconds)
        # A step whose rewards had arrived may have ended since.
        assert metrics.read_text().count("\n") <= num_steps + 1
        steps_then = metrics.read_text().count("\n")
        for server in servers:
            server.start()
        _wait_for(lambda: metrics.read_text().count("\n") > steps_then)
        times["went on"] = time.monotonic()

    try:
        for server in servers:
            server.start()
        train(path, "output_dir=undisturbed")
        thread = threading.Thread(target=disturb)
        thread.start()
        train(path)
        thread.join()
    finally:
        for server in servers:
            server.kill()
    rows = [records(folder / run) for run in ("undisturbed", "run")]
    return Result(
        rewards=[[row["reward"] for row in run] for run in rows],
        errors=[row[f"rewards/{name}/errors"] for row in rows[1] for name in ("judge", "remote_reward_model")],
        waited=times["went on"] - times["killed"],
    )


def _write_recipe(folder: Path, model: Path, servers: list[Server], *, outage_minutes: float) -> str:
    judge, remote = servers
    rewards = {
        "my_rewards:letters": {"weight": 0.1},
        "judge": {
            "base_url": f"{judge.url}/v1",
            "model": "judge",
            "rubric": "Many letters are good.",
            "outage_timeout": outage_minutes,
        },
        "remote_reward_model": {"url": remote.url, "route": "http", "outage_timeout": outage_minutes},
    }
    path = rloo_recipe(folder, "run", model, rloo={"max_steps": NUM_STEPS, "save_steps": 100, "beta": 0.0})
    path.write_text(json.dumps({**json.loads(path.read_text()), "rewards": rewards}))
    return str(path)


def _wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise AssertionError("the run does not go on")
        time.sleep(0.02)


def main() -> None:
    """Run once, and print what was seen."""
    from tests.chaos.runs import write_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0, help="time without servers (120)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.chdir(scratch)
        sys.path.insert(0, scratch)
        folder = Path(scratch)
        result = kill_in_mid_run(folder, write_model(folder / "model"), options.seconds)
        os.chdir("/")
    undisturbed, disturbed = result.rewards
    print(f"both servers were away for {options.seconds:g} s; the next step ended {result.waited:.1f} s after SIGKILL")
    print(
        f"steps: {len(disturbed)} of {len(undisturbed)}; rewards {undisturbed} without and {disturbed} with the outage"
    )
    print(f"completions with an error: {sum(result.errors):g}")
    sys.exit(undisturbed != disturbed or any(result.errors))


if __name__ == "__main__":
    main()
