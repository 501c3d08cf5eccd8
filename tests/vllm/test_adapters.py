"""The column vLLM of the table of adapters, run: one real server holds every adapter that the table says it loads.

VLLM_PYTHON=/path/to/vllm/bin/python python -m pytest -m vllm tests/vllm/test_adapters.py
"""

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from rekatrain.data.errors import InputError
from rekatrain.trainer.cli import main
from rekatrain.trainer.models.probe import read_probe
from rekatrain.trainer.rloo.sampler.vllm.client import ServerClient
from rekatrain.trainer.rloo.sampler.vllm.served_probe import check_served
from tests.helpers.adapters import METHODS
from tests.helpers.exports import serve_by_vllm
from tests.trainer.export.test_adapter_table import TABLE, write_recipe

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="VLLM_PYTHON names no python that has vLLM"),
]
# The server has one base: the tables' models have equal weights, except those whose head is tied.
SERVED = [method for method, cells in TABLE.items() if cells["vLLM"] and not METHODS[method][0]]


def folder_of(folder: Path, method: str) -> Path:
    return folder / f"adapter-{SERVED.index(method)}"


@pytest.fixture(scope="module")
def folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of three steps and an export `adapter` for each method that vLLM loads."""
    folder = tmp_path_factory.mktemp("adapters")
    for method in SERVED:
        own = folder_of(folder, method)
        own.mkdir()
        main(["train", str(write_recipe(own, tokenizer, method))])
        main(["export", str(own / "run"), str(own / "adapter"), "--as", "adapter"])
    return folder


@pytest.fixture(scope="module")
def url(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The url of a vLLM that was started by the script of the first export, with the other adapters beside it."""
    adapters = [f"{folder_of(folder, method).name}={folder_of(folder, method) / 'adapter'}" for method in SERVED]
    options = ["--lora-modules", *adapters, "--max-lora-rank", "16", "--max-loras", "2"]
    first = folder_of(folder, SERVED[0]) / "adapter"
    with serve_by_vllm(first, tmp_path_factory.mktemp("server"), *options) as url:
        yield url


def check(folder: Path, url: str, method: str, name: str) -> None:
    """Raise InputError unless the server's model `name` is the one in training of a method."""
    probe = read_probe(folder_of(folder, method) / "run" / "checkpoints" / "checkpoint-3")
    assert probe is not None and probe.dtype == "float32"

    async def compare() -> None:
        async with ServerClient(url, request_timeout=60) as client:
            await check_served(client, probe, model=name)

    asyncio.run(compare())


@pytest.mark.parametrize("method", SERVED)
def test_vllm_serves_the_adapter_that_was_trained(folder: Path, url: str, method: str) -> None:
    check(folder, url, method, folder_of(folder, method).name)
    with pytest.raises(InputError, match="log-probabilities differ"):
        check(folder, url, method, "base")
