"""Publish the policy's weights to the servers, and check which weights each response came from.

With LoRA only the adapter moves. It is written to a folder of the run that the servers can read, and loaded at runtime
under a unique name; then the previous adapter is unloaded. A response names its adapter.
In full fine-tuning the whole model is written and the server reloads it (vLLM's development mode), under a version that
the trainer sets there. The trainer reads that version again after each response. On GPUs the weights can be sent by
NCCL instead (transfer.py).
"""

import asyncio
import shutil
import uuid
import zlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from filelock import AsyncFileLock
from peft import PeftModel

from rekatrain.data.errors import InputError
from rekatrain.rewards.models.endpoint import Json
from rekatrain.trainer.models.adapter_scales import fold_scales
from rekatrain.trainer.models.load import Policy
from rekatrain.trainer.models.probe import TrainingProbe
from rekatrain.trainer.rloo.distributed import trained_weights
from rekatrain.trainer.rloo.sampler.vllm.client import RequestRejected, ServerClient, ServerDown
from rekatrain.trainer.rloo.sampler.vllm.served_probe import check_served
from rekatrain.trainer.rloo.sampler.vllm.transfer import WeightTransfer

# After a failure in several workers, vLLM 0.30 takes the answers of all but the first for those to the next requests.
AGAIN = "start the server again if it spans several GPUs"
WEIGHTS_FOLDER = "served"  # in the run's folder: the weights that the servers have, or load next
# Seconds for requests that a server carries out at once.
SHORT_TIMEOUT = 60.0


@dataclass(frozen=True, kw_only=True)
class AdapterWeights:
    """A LoRA adapter in a folder; the names of all adapters of the run begin with `prefix`."""

    name: str
    prefix: str
    folder: Path
    probe: TrainingProbe

    @property
    def model(self) -> str:
        """Model name in requests: the name of the adapter."""
        return self.name

    async def load(self, client: ServerClient, before_requests: Callable[[], Awaitable[None]] | None = None) -> None:
        """Load the adapter unless the server has it, then unload the run's other adapters: nothing uses them now.

        before_requests: awaited when the adapter is loaded, before a completion is requested (sleep.py)
        """
        async with lock_of(self.folder, client):
            names = await served_names(client)
            if self.name not in names:
                try:
                    await load_adapter(client, self.name, self.folder)
                except RequestRejected as error:
                    raise InputError(explain_rejection(error, client.url, self.folder)) from None
            if before_requests is not None:
                await before_requests()
            if self.name not in names:
                await check_served(client, self.probe, model=self.name)
            for name in names:
                if name.startswith(self.prefix) and name != self.name:
                    await client.post("/v1/unload_lora_adapter", {"lora_name": name})

    async def check(self, client: ServerClient, response: Json) -> None:
        """Raise ServerDown unless the response names this adapter."""
        if response.get("model") != self.name:
            raise ServerDown(f"the vLLM server {client.url} answered from {response.get('model')!r}, not {self.name!r}")


@dataclass(frozen=True, kw_only=True)
class FolderWeights:
    """A whole model in a folder."""

    name: str
    folder: Path
    probe: TrainingProbe

    model: None = None

    async def load(self, client: ServerClient, before_requests: Callable[[], Awaitable[None]] | None = None) -> None:
        """Reload the server's model from the folder, unless the server has this version already.

        before_requests: awaited when the model is loaded, before a completion is requested (sleep.py)
        """
        async with lock_of(self.folder, client):
            if await served_version(client) == self.name:
                if before_requests is not None:
                    await before_requests()
                return
            try:
                await reload_model(client, self.folder)
                await client.post("/reset_prefix_cache")  # its states come from the old weights
            except RequestRejected as error:
                raise InputError(f"{error}; the server must be able to read {str(self.folder)!r}") from None
            if before_requests is not None:
                await before_requests()
            await check_served(client, self.probe, model=None)
            await client.post("/update_weight_version", {"new_version": self.name})

    async def check(self, client: ServerClient, response: Json) -> None:
        """Raise ServerDown unless the server has this version; versions change between steps only."""
        version = await served_version(client)
        if version != self.name:
            raise ServerDown(f"the vLLM server {client.url} has weights {version!r}, not {self.name!r}")


@dataclass(frozen=True, kw_only=True)
class SentWeights:
    """A whole model that was sent to the servers' GPUs by NCCL."""

    name: str

    model: None = None

    async def load(self, client: ServerClient) -> None:
        """Raise InputError unless the server has the weights: a restarted one lost them, and cannot load them here."""
        if await served_version(client) != self.name:
            raise lost_weights(client)

    async def check(self, client: ServerClient, response: Json) -> None:
        """Raise InputError unless the server has this version; versions change between steps only."""
        await self.load(client)


def send(
    accelerator: Accelerator, transfer: WeightTransfer, urls: Sequence[str], num_updates: int, probe: TrainingProbe
) -> SentWeights:
    """Send the policy's weights to all servers by NCCL and set their version there; every process must call this."""
    names = [f"rekatrain-{num_updates}-{uuid.uuid4().hex[:8]}"]
    broadcast_object_list(names)
    transfer.send()

    async def set_version(url: str) -> None:
        async with ServerClient(url, request_timeout=SHORT_TIMEOUT) as client:
            await client.post("/reset_prefix_cache")
            await check_served(client, probe, model=None)
            await client.post("/update_weight_version", {"new_version": names[0]})

    if accelerator.is_main_process:
        for url in urls:
            asyncio.run(set_version(url))
    accelerator.wait_for_everyone()
    return SentWeights(name=names[0])


def publish(
    accelerator: Accelerator, policy: Policy, run_folder: Path, num_updates: int, probe: TrainingProbe
) -> AdapterWeights | FolderWeights:
    """Write the policy's weights to a folder that the servers read, and delete older ones.

    Every process must call this, because ZeRO-3 gathers the weights from all. Nothing is sent yet: a server loads the
    weights before its first group of the step, and is then held against the probe of these weights.
    """
    folder = write_weights(accelerator, policy, run_folder, num_updates, num_kept=0)
    if isinstance(policy, PeftModel):
        return AdapterWeights(name=folder.name, prefix=prefix_of(folder.parent), folder=folder, probe=probe)
    return FolderWeights(name=folder.name, folder=folder, probe=probe)


def write_weights(
    accelerator: Accelerator, policy: Policy, run_folder: Path, num_updates: int, *, num_kept: int
) -> Path:
    """Write the policy's weights to a new folder, whose name is unique; every process must call this.

    num_kept: number of earlier versions to keep
    """
    served = run_folder.absolute() / WEIGHTS_FOLDER
    # A unique name: not even other weights of the same run, before a restart, had it.
    names = [f"{prefix_of(served)}{num_updates}-{uuid.uuid4().hex[:8]}"]
    broadcast_object_list(names)
    folder = served / names[0]
    state = trained_weights(accelerator, policy)
    if accelerator.is_main_process:
        versions = served.glob(f"{prefix_of(served)}[0-9]*-*")
        older = sorted(versions, key=lambda path: path.stat().st_mtime_ns, reverse=True)[num_kept:]
        policy.save_pretrained(str(folder), state_dict=state)
        if isinstance(policy, PeftModel):
            fold_scales(folder)
        for path in older:
            shutil.rmtree(path)
    accelerator.wait_for_everyone()
    return folder


def prefix_of(served: Path) -> str:
    """Return the beginning of all names of weights of a run."""
    return f"rekatrain-{zlib.crc32(str(served).encode()):08x}-"


def lock_of(folder: Path, client: ServerClient) -> AsyncFileLock:
    """Return the lock under which one process of the run at a time changes a server's weights."""
    return AsyncFileLock(folder.parent / f"{zlib.crc32(client.url.encode()):08x}.lock")


async def load_adapter(client: ServerClient, name: str, folder: Path | None) -> None:
    """Have a server read an adapter from a folder, under a name; without both it only checks the request."""
    await client.post("/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder or "")})


async def reload_model(client: ServerClient, folder: Path) -> None:
    """Have a server replace its whole model by the one in a folder."""
    await client.post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})


def lost_weights(client: ServerClient) -> InputError:
    """Return the error for a server without the weights that NCCL has sent."""
    return InputError(
        f"the vLLM server {client.url} lost the weights that NCCL sent, for example by a restart; continue the run "
        "with --resume"
    )


async def served_names(client: ServerClient) -> list[str]:
    """Return the names of a server's model and adapters."""
    models = (await client.get("/v1/models")).get("data", [])
    return [str(model["id"]) for model in models]


async def served_version(client: ServerClient) -> str:
    """Return the version of a server's weights that the trainer has set there."""
    try:
        return str((await client.get("/weight_info")).get("weight_version"))
    except RequestRejected as error:
        raise InputError(
            f"{error}; full fine-tuning needs the development routes: start it by rekatrain serve-rollouts, or with "
            "VLLM_SERVER_DEV_MODE=1"
        ) from None


def explain_rejection(error: RequestRejected, url: str, folder: Path) -> str:
    """Return the text of an error for weights that a server rejects."""
    if "LoRA is not enabled" in str(error):
        return f"the vLLM server {url} was started without --enable-lora: start it by rekatrain serve-rollouts"
    if error.status == 404 and "No adapter found" not in str(error):
        return (
            f"the vLLM server {url} loads no adapters at runtime: start it by rekatrain serve-rollouts, or with "
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
        )
    if error.status == 404:
        return f"the vLLM server {url} cannot read {str(folder)!r}: it must share the run's output_dir; {AGAIN}"
    if "No adapter found" in str(error):
        return f"the vLLM server {url} answers an earlier request ({error}): {AGAIN}"
    return str(error)
