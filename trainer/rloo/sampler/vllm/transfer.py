"""Send whole models from the training GPUs to the servers' GPUs by NCCL: vLLM 0.30's weight-transfer interface.

vLLM's trainer engine does the work, so vLLM must be installed in the trainer's environment too. This has not been run
yet, because it needs GPUs. A test without GPUs checks that vLLM's classes accept our arguments.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import httpx2
import torch
from torch import Tensor

from rekatrain.data.errors import InputError
from rekatrain.trainer.rloo.gather import gathered


class WeightTransfer:
    """NCCL groups, one per server, of the main process and the server's workers."""

    def __init__(self, urls: Sequence[str], policy: torch.nn.Module, *, rank: int) -> None:
        """Connect to the servers; every process must call this, and rank 0 sends."""
        if not torch.cuda.is_available():
            raise InputError("rloo.vllm_weight_transfer nccl moves weights between GPUs: set it to folder")
        try:
            from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
            from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
            from vllm.utils.network_utils import get_ip, get_open_port
        except ImportError as error:
            raise InputError(
                f"rloo.vllm_weight_transfer nccl needs vllm>=0.30 beside the trainer ({error}); or set it to folder"
            ) from None
        source = policy_source(policy)
        self._engines = []
        for url in urls:
            info = init_info(
                rank=rank, master_address=get_ip(), master_port=get_open_port(), num_workers=_num_workers(url)
            )
            client = HTTPVLLMWeightSyncClient(url)
            self._engines.append(WeightTransferTrainerFactory.trainer_init(info, client=client, source=source))

    def send(self) -> None:
        """Send the policy's weights to each server in turn; every process must call this, because ZeRO-3 gathers."""
        for engine in self._engines:
            engine.send_weights()


def init_info(*, rank: int, master_address: str, master_port: int, num_workers: int) -> Any:  # Any: vLLM's class
    """Return the address and sizes of the NCCL group of the main process and a server's workers."""
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    return NCCLTrainerInitInfo(
        rank=rank, master_address=master_address, master_port=master_port, world_size=1 + num_workers
    )


def policy_source(policy: torch.nn.Module) -> Any:  # Any: vLLM's class
    """Return a policy's parameters as vLLM's `WeightSource`, which yields one whole parameter at a time."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class PolicySource(WeightSource):
        def metadata(self) -> list[ParamMeta]:
            return [
                ParamMeta(name, parameter.dtype, tuple(getattr(parameter, "ds_shape", parameter.shape)))
                for name, parameter in policy.named_parameters()
            ]

        def __iter__(self) -> Iterator[tuple[str, Tensor]]:
            for name, parameter in policy.named_parameters():
                with gathered([parameter]):
                    yield name, parameter.detach()

    return PolicySource()


def _num_workers(url: str) -> int:
    response = httpx2.get(f"{url}/get_world_size")
    if response.status_code != 200:
        raise InputError(
            f"the vLLM server {url} accepts no weights: start it by rekatrain serve-rollouts, or with "
            "VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config"
        )
    return int(response.json()["world_size"])
