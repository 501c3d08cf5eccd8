"""`--push-to-hub`: uploads into a private repository of a hub that this test runs; mistakes are found first."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from rekatrain.data.errors import InputError
from rekatrain.trainer.cli import main
from rekatrain.trainer.export.hub import check_hub, push
from tests.helpers.fake_hub import Hub, serve_hub


@pytest.fixture
def hub() -> Iterator[type[Hub]]:
    """A hub of this test, and a process that is online and has a token."""
    with serve_hub() as handler:
        yield handler


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "serving").mkdir()
    (tmp_path / "README.md").write_text("card")
    (tmp_path / "serving" / "vllm.sh").write_text("exec")
    return tmp_path


def test_push_writes_every_file_into_a_private_repository(hub: type[Hub], folder: Path) -> None:
    check_hub("me/model")
    assert push(folder, "me/model") == "https://huggingface.co/me/model/commit/abc"
    assert hub.files == {"README.md": b"card", "serving/vllm.sh": b"exec"}
    (created,) = hub.created
    assert created["visibility"] == "private" and created["name"] == "model" and created["token"] == "Bearer hf_secret"


def test_hub_that_rejects_leaves_the_export_and_one_line(hub: type[Hub], folder: Path) -> None:
    hub.status = 403
    with pytest.raises(
        InputError, match=r"^--push-to-hub me/model: the hub did not accept it .*403.*hf upload me/model"
    ) as e:
        push(folder, "me/model")
    assert "\n" not in str(e.value) and "hf_secret" not in str(e.value) and (folder / "README.md").exists()


@pytest.mark.parametrize("repo", ["", "model", "a/b/c", "me/mo del", "me/-model", "me/.."])
def test_name_that_the_hub_has_not_is_refused_first(hub: type[Hub], capsys, repo: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["export", "none", "out", "--push-to-hub", repo])
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and "--push-to-hub" in line and line.count("\n") == 1


def test_process_without_token_or_network_is_refused_first(hub: type[Hub], monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE is set"):
        check_hub("me/model")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nonexistent/token")
    with pytest.raises(InputError, match="there is no token: set HF_TOKEN"):
        check_hub("me/model")
