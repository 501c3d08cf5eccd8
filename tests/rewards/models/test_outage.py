"""Servers that go away: the step waits for them, another one takes over, and a bad request is no outage."""

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rekatrain.data.errors import RunInterrupted
from rekatrain.rewards.compose import build_reward_functions
from rekatrain.rewards.errors import RewardError
from rekatrain.rewards.models import outage
from rekatrain.rewards.models.endpoint import Endpoint
from rekatrain.rewards.models.outage import ServerAway
from rekatrain.trainer.api import train
from tests.end_to_end.small_runs import OPTIONS, records, rloo_recipe, write_data
from tests.rewards.models.outage import NUM_STEPS, Server, kill_in_mid_run


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outage, "_BACK_OFF", lambda state: 0.05)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.kill()


def post(urls: str | list[str], *answers: str, **options: float) -> list:
    settings = {"concurrency": 4, "request_timeout": 5.0, "max_retries": 1, "outage_timeout": 1.0} | options
    client = Endpoint(urls, api_key_env=None, **settings)
    return asyncio.run(client.post_all("", [{"answers": [answer]} for answer in answers]))


def later(seconds: float, function: Callable[[], object]) -> threading.Thread:
    thread = threading.Timer(seconds, function)
    thread.start()
    return thread


def test_requests_wait_for_a_server_that_is_away(server, caplog) -> None:
    waiter = later(1.5, server.start)
    with caplog.at_level(logging.WARNING):
        assert post(server.url, *["abcd"] * 20) == [{"scores": [0.2]}] * 20
    waiter.join()
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2, messages
    assert "waits and asks again, for up to 1 minutes (outage_timeout)" in messages[0] and "is back" in messages[1]


def test_requests_give_up_after_the_outage_timeout(server) -> None:
    started = time.monotonic()
    with pytest.raises(ServerAway, match="has been away for 0.02 minutes"):
        post(server.url, *["abcd"] * 20, outage_timeout=0.02)
    assert 1.2 <= time.monotonic() - started < 5


def test_requests_without_outage_timeout_are_errors(server) -> None:
    results = post(server.url, "a", "b", outage_timeout=0.0)
    assert all(isinstance(result, RewardError) for result in results)


def test_request_that_a_server_never_answers_is_its_own_error(serve) -> None:
    def answer(path: str, body: dict | None) -> tuple[int, dict]:
        if body is not None and body["answers"] == ["poison"]:
            raise ConnectionAbortedError("the connection is closed without an answer")
        return 200, {"ok": True}

    url = serve(answer).url
    alone, *_ = post(url, "poison")
    assert isinstance(alone, RewardError)
    results = post(url, "a", "poison", "b")
    assert results[0] == results[2] == {"ok": True} and isinstance(results[1], RewardError)


def test_several_servers_are_asked_in_turn(serve) -> None:
    servers = [serve(lambda path, body: (200, {"ok": True})) for _ in range(3)]
    post([each.url for each in servers], *["a"] * 12)
    assert [len(each.paths) for each in servers] == [4, 4, 4]


def test_another_server_takes_over_at_once(serve, server) -> None:
    alive = serve(lambda path, body: (200, {"ok": True}))
    started = time.monotonic()
    assert post([server.url, alive.url], *["a"] * 12, max_retries=0) == [{"ok": True}] * 12
    assert len(alive.paths) == 12 and time.monotonic() - started < 3


@pytest.mark.parametrize("urls", [[], ["http://127.0.0.1:1", "ftp://x"]])
def test_server_lists_are_checked(urls) -> None:
    with pytest.raises(ValueError, match="URL"):
        build_reward_functions({"remote_reward_model": {"url": urls, "route": "http"}})


# A whole run


def recipe(folder: Path, model: Path, server: Server, outage_timeout: float) -> str:
    write_data(folder)
    # The second reward kills the server, as its only effect, when a file says so.
    (folder / "killer.py").write_text(
        "import os\nfrom pathlib import Path\n\n\n"
        "def killer(completions, trainer_state, **kwargs):\n"
        "    file = Path('kill')\n"
        "    if trainer_state.global_step == 2 and file.exists():\n"
        "        os.kill(int(file.read_text()), 9)\n"
        "        file.unlink()\n"
        "    return [0.0] * len(completions)\n"
    )
    remote = {"url": server.url, "route": "http", "outage_timeout": outage_timeout, "max_retries": 1}
    rewards = {"killer:killer": {"weight": 0}, "remote_reward_model": remote}
    options = {**OPTIONS, "max_steps": 4, "save_steps": 100}
    path = rloo_recipe(folder, "run", model, rloo=options)
    path.write_text(json.dumps({**json.loads(path.read_text()), "rewards": rewards}))
    return str(path)


def start_over(server: Server, folder: Path, seconds: float) -> threading.Thread:
    """Start the server again some seconds after it has been killed."""
    (folder / "kill").write_text(str(server.process.pid))

    def wait() -> None:
        server.process.wait()
        time.sleep(seconds)
        server.start()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def test_run_loses_no_step_while_its_server_is_away(tmp_path, model_folder, server, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    server.start()
    path = recipe(tmp_path, model_folder, server, 1.0)
    train(path, "output_dir=undisturbed")
    thread = start_over(server, tmp_path, 2.0)
    train(path)
    thread.join()
    assert not (tmp_path / "kill").exists()
    rewards = [[record["reward"] for record in records(tmp_path / run)] for run in ("run", "undisturbed")]
    assert rewards[0] == rewards[1] and len(rewards[0]) == 4
    assert all(record["rewards/remote_reward_model/errors"] == 0 for record in records(tmp_path / "run"))


def test_run_waits_for_a_judge_and_a_server_killed_at_once(tmp_path, model_folder, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    result = kill_in_mid_run(tmp_path, model_folder, 2.0)
    assert result.rewards[0] == result.rewards[1] and len(result.rewards[1]) == NUM_STEPS
    assert set(result.errors) == {0.0} and result.waited >= 2.0


def test_run_saves_and_stops_after_the_outage_timeout(tmp_path, model_folder, server, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    server.start()
    path = recipe(tmp_path, model_folder, server, 0.02)
    (tmp_path / "kill").write_text(str(server.process.pid))
    with pytest.raises(RunInterrupted) as stopped:
        train(path)
    assert f"an outage: {server.url} has been away" in str(stopped.value)
    assert "after step 2: checkpoint-2 is saved" in str(stopped.value) and "\n" not in str(stopped.value)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-2"]
    server.process.wait()
    server.start()
    train(path, resume=True)
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2, 3, 4]
