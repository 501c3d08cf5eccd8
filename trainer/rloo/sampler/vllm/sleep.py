"""Servers on the GPUs that train: they sleep while the policy trains, and give their memory back (vLLM's sleep mode).

    sample            | sleep | train | publish (folder) | wake weights | load | wake kv_cache | probe | sample

The order matters: loading needs the memory of the weights, and a request needs the cache; until both are there vLLM
holds requests back. With LoRA the servers keep the base weights in host memory (level 1). In full fine-tuning they drop
them, because each step brings new ones (level 2); their version is then marked as lost, so that they load again.

On a CPU vLLM 0.30 only pauses: the routes and their order are the same, and no memory is given back.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial

import torch
from accelerate import Accelerator

from rekatrain.data.errors import InputError
from rekatrain.trainer.processes.interruption import INTERRUPTION
from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.rloo.sampler.vllm.client import RequestRejected, ServerClient, ServerDown
from rekatrain.trainer.rloo.sampler.vllm.weights import AdapterWeights, FolderWeights

logger = logging.getLogger(__name__)

# Version of a server whose weights were dropped.
ASLEEP = "rekatrain-asleep"
START = "start it by rekatrain launch with placement: shared"


class SleepingServers:
    """The servers of a run that share its GPUs; they are awake at first. Every process must call the methods."""

    def __init__(self, accelerator: Accelerator, config: RLOOConfig, *, has_adapter: bool) -> None:
        self._accelerator, self._config = accelerator, config
        self._level = 1 if has_adapter else 2
        self._is_awake = True

    def sleep(self) -> None:
        """Have all servers give their memory back, once no process has a request in flight."""
        if self._is_awake:
            self._is_awake = False
            self._on_each(self._put_to_sleep)

    def wake(self, weights: AdapterWeights | FolderWeights) -> None:
        """Have all servers take their memory again, with these weights."""
        if not self._is_awake:
            self._is_awake = True
            self._on_each(partial(self._wake, weights))

    def _on_each(self, action: Callable[[ServerClient], Awaitable[None]]) -> None:
        """Run `action` for each server on the main process, between two points that all processes reach."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what PyTorch keeps for itself is missing to the server
        self._accelerator.wait_for_everyone()

        async def act(url: str) -> None:
            async with ServerClient(url, request_timeout=self._config.vllm_request_timeout) as client:
                try:
                    await action(client)
                except (ServerDown, RequestRejected) as error:
                    raise InputError(f"{error}; {START}, and continue the run with --resume") from None

        if self._accelerator.is_main_process:
            with INTERRUPTION.unbroken():
                for url in self._config.vllm_server_urls:
                    asyncio.run(act(url))
        self._accelerator.wait_for_everyone()

    async def _put_to_sleep(self, client: ServerClient) -> None:
        if self._level == 2:
            await client.post("/update_weight_version", {"new_version": ASLEEP})
        await client.post(f"/sleep?level={self._level}")

    async def _wake(self, weights: AdapterWeights | FolderWeights, client: ServerClient) -> None:
        await client.post("/wake_up?tags=weights")

        async def wake_cache() -> None:
            await client.post("/wake_up?tags=kv_cache")

        await weights.load(client, wake_cache)


def check_awake(config: RLOOConfig) -> None:
    """Raise InputError if a server has no sleep mode, or sleeps: it would hold the first request back for ever."""

    async def check(url: str) -> None:
        async with ServerClient(url, request_timeout=config.vllm_request_timeout) as client:
            try:
                is_sleeping = (await client.get("/is_sleeping")).get("is_sleeping")
            except ServerDown as error:
                raise InputError(f"{error}; {START}") from None
            except RequestRejected as error:
                raise InputError(
                    f"{error}; rloo.vllm_enable_sleep_mode needs vLLM's development routes: {START}, or with "
                    "VLLM_SERVER_DEV_MODE=1 and --enable-sleep-mode"
                ) from None
            if is_sleeping:
                raise InputError(f"the vLLM server {url} sleeps since an earlier run: start it again")

    for url in config.vllm_server_urls:
        asyncio.run(check(url))
