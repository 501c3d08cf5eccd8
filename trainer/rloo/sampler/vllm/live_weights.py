"""Update the weights of servers while requests are in flight: `max_staleness` above 1.

A server is paused, which freezes its requests (vLLM's mode keep), loads the weights, and goes on: no token is thrown
away. It keeps the KV cache of the tokens so far, as PipelineRL does (arXiv 2509.19128): to compute that again would
cost as much as a prompt of all tokens in flight. The log-probability of each token is the one that it was drawn with,
so the importance weights are right for any cache. `cache_salt` keeps new requests from prefixes of earlier weights.

An adapter has one name and one folder for the whole run. Its files are replaced and the server's copy is removed; the
server reads the folder again with the next token. vLLM's `load_inplace` would read it with every token (vLLM 0.30).
"""

import asyncio
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from peft import PeftModel

from rekatrain.data.errors import InputError
from rekatrain.rewards.models.endpoint import Json
from rekatrain.trainer.models.load import Policy
from rekatrain.trainer.models.probe import TrainingProbe
from rekatrain.trainer.rloo.sampler.vllm.client import RequestRejected, ServerClient, ServerDown
from rekatrain.trainer.rloo.sampler.vllm.served_probe import check_busy
from rekatrain.trainer.rloo.sampler.vllm.transfer import WeightTransfer
from rekatrain.trainer.rloo.sampler.vllm.weights import (
    WEIGHTS_FOLDER,
    explain_rejection,
    load_adapter,
    lock_of,
    lost_weights,
    prefix_of,
    reload_model,
    served_names,
    served_version,
    write_weights,
)

PAUSE, RESUME = "/pause?mode=keep&clear_cache=false", "/resume"
# Name of an adapter after the run's prefix, and the file with the version of the adapter in its folder.
LIVE, VERSION_FILE = "live", "version.txt"
# A pause returns after vLLM has sent all tokens; they may still be on their way for so long.
SETTLE_SECONDS = 0.1


@dataclass(frozen=True, kw_only=True)
class LiveWeights:
    """Weights that servers load while requests are in flight.

    name:   version of the weights, unique
    folder: their files
    live:   folder of the adapter that servers read, whose name is the adapter's; None for a whole model
    """

    name: str
    folder: Path
    live: Path | None
    probe: TrainingProbe
    is_sent: bool = False  # by NCCL

    @property
    def model(self) -> str | None:
        """Model name in requests: the name of the adapter."""
        return self.live.name if self.live else None

    def install(self) -> None:
        """Replace the adapter's files that servers read next; no server may be reading them."""
        if self.live is None:
            return
        self.live.mkdir(parents=True, exist_ok=True)
        for path in self.folder.iterdir():
            if path.is_file():
                shutil.copyfile(path, self.live / f"{path.name}.new")
                os.replace(self.live / f"{path.name}.new", self.live / path.name)
        (self.live / VERSION_FILE).write_text(self.name)

    async def load(self, client: ServerClient) -> None:
        """Bring a server to these weights that is new, or was down; return early where they are replaced already."""
        async with lock_of(self.folder, client):
            if self.live and (self.live / VERSION_FILE).read_text() != self.name:
                return
            if await self._is_loaded(client):
                return
            await client.post(PAUSE)
            try:
                await self.swap(client)
            finally:
                await client.post(RESUME)
            await check_busy(client, self.probe, model=self.model)

    async def swap(self, client: ServerClient) -> None:
        """Let a paused server use these weights, and set its version."""
        if self.is_sent:
            raise lost_weights(client)
        try:
            if self.live is None:
                await reload_model(client, self.folder)
            elif self.live.name in await served_names(client):
                loaded = await client.post("/collective_rpc", {"method": "list_loras"})
                for number in sorted(set(re.findall(r"\d+", str(loaded.get("results"))))):
                    await client.post("/collective_rpc", {"method": "remove_lora", "args": [int(number)]})
            else:
                await load_adapter(client, self.live.name, self.live)
        except RequestRejected as error:
            raise InputError(explain_rejection(error, client.url, self.live or self.folder)) from None
        await client.post("/update_weight_version", {"new_version": self.name})

    async def check(self, client: ServerClient, response: Json) -> None:
        """Raise ServerDown unless the server has this version."""
        version = await served_version(client)
        if version != self.name:
            raise ServerDown(f"the vLLM server {client.url} has weights {version!r}, not {self.name!r}")

    async def _is_loaded(self, client: ServerClient) -> bool:
        if await served_version(client) != self.name:
            return False
        return self.live is None or self.live.name in await served_names(client)


def publish_live(
    accelerator: Accelerator, policy: Policy, run_folder: Path, num_updates: int, probe: TrainingProbe, *, is_sent: bool
) -> LiveWeights:
    """Write the policy's weights to a folder, as `publish` does, or only name them where NCCL sends them."""
    if is_sent:
        names = [f"rekatrain-{num_updates}-{uuid.uuid4().hex[:8]}"]
        broadcast_object_list(names)
        folder = run_folder.absolute() / WEIGHTS_FOLDER / names[0]
        folder.parent.mkdir(parents=True, exist_ok=True)  # it has the locks of the servers
    else:
        # A server that is back may still be reading the version before.
        folder = write_weights(accelerator, policy, run_folder, num_updates, num_kept=1)
    live = folder.parent / f"{prefix_of(folder.parent)}{LIVE}" if isinstance(policy, PeftModel) else None
    return LiveWeights(name=folder.name, folder=folder, live=live, probe=probe, is_sent=is_sent)


def update_in_flight(
    accelerator: Accelerator,
    urls: Sequence[str],
    weights: LiveWeights,
    begin: Callable[[], None],
    *,
    transfer: WeightTransfer | None,
    request_timeout: float,
) -> None:
    """Pause all servers, let them load the weights, and let them go on; every process must call this.

    begin: called while all are paused: tokens that arrive later come from the new weights

    Each process updates some of the servers. One that is down gets the weights when it is back (`load`).
    """
    own = urls[accelerator.process_index :: accelerator.num_processes]

    async def update() -> None:
        async with AsyncExitStack() as stack:
            clients = [
                await stack.enter_async_context(ServerClient(url, request_timeout=request_timeout)) for url in own
            ]
            for client in clients:  # against `load` by another process
                await stack.enter_async_context(lock_of(weights.folder, client))
            # 1. Pause all servers, and wait for the last tokens of the old weights.
            is_paused = await asyncio.gather(*(_succeeds(client, PAUSE) for client in clients))
            accelerator.wait_for_everyone()
            time.sleep(SETTLE_SECONDS)  # the thread of the requests receives them
            begin()
            # 2. Load the new weights.
            if accelerator.is_main_process:
                weights.install()
            accelerator.wait_for_everyone()
            if transfer is not None:
                transfer.send()
            paused = [client for client, is_up in zip(clients, is_paused, strict=True) if is_up]
            await asyncio.gather(*(_load_and_resume(client, weights) for client in paused))

    asyncio.run(update())
    accelerator.wait_for_everyone()


def check_live(urls: Sequence[str], weights: LiveWeights, *, request_timeout: float) -> None:
    """Raise InputError for a server whose weights are not those of the probe, unless it has others by now.

    A server that is full answers after its other requests, so nobody should wait for this.
    """

    async def check(url: str) -> None:
        async with ServerClient(url, request_timeout=request_timeout) as client:
            try:
                await check_busy(client, weights.probe, model=weights.model)
            except (ServerDown, RequestRejected):
                return
            except InputError:
                if await served_version(client) == weights.name:
                    raise

    async def check_all() -> None:
        await asyncio.gather(*(check(url) for url in urls))

    asyncio.run(check_all())


async def _load_and_resume(client: ServerClient, weights: LiveWeights) -> None:
    """Let a paused server load and go on; one that fails is found by the check of its next response."""
    try:
        try:
            if weights.is_sent:
                await client.post("/update_weight_version", {"new_version": weights.name})
            else:
                await weights.swap(client)
        finally:
            await client.post(RESUME)
    except ServerDown:
        return


async def _succeeds(client: ServerClient, path: str) -> bool:
    try:
        await client.post(path)
    except ServerDown:
        return False
    return True
