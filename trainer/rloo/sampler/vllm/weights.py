"""How a policy's weights reach the servers, and how a server proves which ones it answered from.

With LoRA only the adapter moves: it is written to a folder of the run that the servers see too, loaded at runtime under
a name that no other weights ever have, and the one before is unloaded. An answer names its adapter.
In full fine-tuning the whole model is written, and the server reloads it (vLLM's development mode); the version that it
is told then is asked for after each answer. On GPUs it can go by NCCL instead (transfer.py).
"""

import asyncio
import shutil
import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import AsyncFileLock
from peft import PeftModel

from rekatrain.data.errors import InputError
from rekatrain.trainer.models import Policy
from rekatrain.trainer.rloo.distributed import trained_weights
from rekatrain.trainer.rloo.sampler.vllm.client import Json, ServerClient, ServerDown, ServerRefused
from rekatrain.trainer.rloo.sampler.vllm.transfer import WeightTransfer

WEIGHTS_FOLDER = "served"
# Seconds for what a server does at once.
SHORT_TIMEOUT = 60.0


@dataclass(frozen=True, kw_only=True)
class AdapterWeights:
    """A LoRA adapter in a folder; `prefix` begins the names of all adapters of its run."""

    name: str
    prefix: str
    folder: Path

    @property
    def model(self) -> str:
        """An adapter is asked for by its name."""
        return self.name

    async def load(self, client: ServerClient) -> None:
        """Load it unless it is there, then unload the run's others; the last step's rollouts are all in."""
        async with _lock(self.folder, client):
            names = await _served_names(client)
            if self.name not in names:
                try:
                    await client.post("/v1/load_lora_adapter", {"lora_name": self.name, "lora_path": str(self.folder)})
                except ServerRefused as error:
                    raise InputError(_why_no_adapter(error, client.url, self.folder)) from None
            for name in names:
                if name.startswith(self.prefix) and name != self.name:
                    await client.post("/v1/unload_lora_adapter", {"lora_name": name})

    async def check(self, client: ServerClient, answer: Json) -> None:
        """An answer names the adapter that it came from."""
        if answer.get("model") != self.name:
            raise ServerDown(f"the vLLM server {client.url} answered from {answer.get('model')!r}, not {self.name!r}")


@dataclass(frozen=True, kw_only=True)
class FolderWeights:
    """A whole model in a folder."""

    name: str
    folder: Path

    model: None = None

    async def load(self, client: ServerClient) -> None:
        """Reload the server's model from the folder, unless that is its version already."""
        async with _lock(self.folder, client):
            if await _version(client) == self.name:
                return
            try:
                await client.post(
                    "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(self.folder)}}
                )
                await client.post("/reset_prefix_cache")  # what was computed with the old weights
            except ServerRefused as error:
                raise InputError(f"{error}; the server must see {str(self.folder)!r}, a folder of the run") from None
            await client.post("/update_weight_version", {"new_version": self.name})

    async def check(self, client: ServerClient, answer: Json) -> None:
        """Weights change between steps only: if the version still is this one, the answer came from it."""
        version = await _version(client)
        if version != self.name:
            raise ServerDown(f"the vLLM server {client.url} has weights {version!r}, not {self.name!r}")


@dataclass(frozen=True, kw_only=True)
class SentWeights:
    """A whole model that has been sent to the servers' GPUs."""

    name: str

    model: None = None

    async def load(self, client: ServerClient) -> None:
        """Nothing to load; a server that was started again does not have them."""
        if await _version(client) != self.name:
            raise InputError(
                f"the vLLM server {client.url} lost the weights that NCCL sent it, as in a restart; go on with --resume"
            )

    async def check(self, client: ServerClient, answer: Json) -> None:
        """Weights change between steps only: if the version still is this one, the answer came from it."""
        await self.load(client)


def send(accelerator: Accelerator, transfer: WeightTransfer, urls: Sequence[str], num_updates: int) -> SentWeights:
    """Send the policy's weights to all servers, and tell them the version; on every process."""
    names = [f"rekatrain-{num_updates}-{uuid.uuid4().hex[:8]}"]
    broadcast_object_list(names)
    transfer.send()

    async def tell(url: str) -> None:
        async with ServerClient(url, request_timeout=SHORT_TIMEOUT) as client:
            await client.post("/reset_prefix_cache")
            await client.post("/update_weight_version", {"new_version": names[0]})

    if accelerator.is_main_process:
        for url in urls:
            asyncio.run(tell(url))
    accelerator.wait_for_everyone()
    return SentWeights(name=names[0])


def publish(
    accelerator: Accelerator, policy: Policy, run_folder: Path, num_updates: int
) -> AdapterWeights | FolderWeights:
    """Write the policy's weights where the servers find them; on every process, for ZeRO-3 gathers them from all.

    Nothing is sent yet: a server loads them before its first group of the step. Older ones are deleted.
    """
    served = run_folder.absolute() / WEIGHTS_FOLDER
    prefix = f"rekatrain-{zlib.crc32(str(served).encode()):08x}-"
    # Never a name that other weights have had, in an earlier life of the run either.
    names = [f"{prefix}{num_updates}-{uuid.uuid4().hex[:8]}"]
    broadcast_object_list(names)
    folder = served / names[0]
    state = trained_weights(accelerator, policy)
    if accelerator.is_main_process:
        older = list(served.glob("*")) if served.exists() else []
        policy.save_pretrained(str(folder), state_dict=state)
        for path in older:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    accelerator.wait_for_everyone()
    if isinstance(policy, PeftModel):
        return AdapterWeights(name=names[0], prefix=prefix, folder=folder)
    return FolderWeights(name=names[0], folder=folder)


def _lock(folder: Path, client: ServerClient) -> AsyncFileLock:
    """One process of the run at a time changes a server's weights."""
    return AsyncFileLock(folder.parent / f"{zlib.crc32(client.url.encode()):08x}.lock")


async def _served_names(client: ServerClient) -> list[str]:
    models = (await client.get("/v1/models")).get("data", [])
    return [str(model["id"]) for model in models]


async def _version(client: ServerClient) -> str:
    try:
        return str((await client.get("/weight_info")).get("weight_version"))
    except ServerRefused as error:
        raise InputError(
            f"{error}; full fine-tuning needs the development routes: start it by rekatrain serve-rollouts, or with "
            "VLLM_SERVER_DEV_MODE=1"
        ) from None


def _why_no_adapter(error: ServerRefused, url: str, folder: Path) -> str:
    if "LoRA is not enabled" in str(error):
        return f"the vLLM server {url} was started without --enable-lora: start it by rekatrain serve-rollouts"
    if error.status == 404 and "No adapter found" not in str(error):
        return (
            f"the vLLM server {url} loads no adapters at runtime: start it by rekatrain serve-rollouts, or with "
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
        )
    if error.status == 404:
        return f"the vLLM server {url} does not see {str(folder)!r}: it must share the run's output_dir"
    return str(error)
