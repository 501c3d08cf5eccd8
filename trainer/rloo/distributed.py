"""Accelerate and DeepSpeed: everything of a step that differs between one process, data parallelism and ZeRO.

ZeRO (arXiv 1910.02054) shards the optimizer (stage 1), the gradients too (2), the weights too (3). At stage 3 every
forward and backward of a layer is an exchange between all processes, at stage 2 every backward: processes must make the
same passes in the same order (`equal_passes` in microbatch.py), and sampling needs the whole weights.
"""

import copy
import math
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, ParallelismConfig
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn
from transformers import enable_full_determinism, set_seed

from rekatrain.data.errors import InputError
from rekatrain.trainer.models.continued import is_adapter
from rekatrain.trainer.processes.launch import (
    adapt_to_device,
    check_engine,
    keep_gradients_in_float32,
    prepare_deepspeed,
    read_launch,
    read_sequence_parallel,
)
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.rloo.gather import gathered

# Norms that must be known before their quantile means something.
FIRST_NORMS = 10


def make_accelerator(*, bf16: bool, ddp_timeout: float) -> Accelerator:
    """Make an Accelerator for one process, data parallelism or ZeRO; InputError unless it is as launched.

    ddp_timeout: seconds that a process waits for the others in an exchange
    """
    launch = read_launch()
    prepare_deepspeed(launch)
    AcceleratorState._reset_state()  # of an earlier run in this process, which may have another `bf16`
    has_gpu, is_deepspeed = torch.cuda.is_available(), launch.engine == "deepspeed"
    backend = "gloo" if is_deepspeed and not has_gpu else "nccl"  # as Accelerate does otherwise: a CPU has gloo
    accelerator = Accelerator(
        # Without a GPU, `Accelerator()` would leave launched processes unconnected and train each alone, silently;
        # under DeepSpeed `cpu=True` would turn it off as silently.
        cpu=not has_gpu and not is_deepspeed,
        kwargs_handlers=[InitProcessGroupKwargs(backend=backend, timeout=timedelta(seconds=ddp_timeout))],
        mixed_precision="bf16" if bf16 else "no",
        parallelism_config=_parallelism(),
        step_scheduler_with_optimizer=False,
    )
    check_engine(launch, accelerator)
    if is_deepspeed:
        plugin = accelerator.state.deepspeed_plugin
        adapt_to_device(plugin)
        keep_gradients_in_float32(plugin)
        # DeepSpeed requires sizes, but micro-batches are laid out by tokens and their denominators are the step's.
        # `backward` says where an update ends, `update_weights` the norm to clip to.
        plugin.deepspeed_config.update(
            train_micro_batch_size_per_gpu=1,
            gradient_accumulation_steps=1,
            train_batch_size=accelerator.num_processes,
            gradient_clipping=0.0,
        )
    return accelerator


def _parallelism() -> ParallelismConfig | None:
    """Turn off Accelerate's own sequence parallelism, which is for a single causal sequence per row of a DataLoader."""
    if read_sequence_parallel() == 1:
        return None
    return ParallelismConfig(dp_replicate_size=1, dp_shard_size=1, tp_size=1, cp_size=1, sp_size=1)


def set_determinism(seed: int, *, is_full: bool) -> None:
    """Seed the random numbers of this process; if `is_full`, let GPUs use deterministic kernels alone.

    Two operations of a step add up by atomics on a GPU otherwise, in an order of chance: the sum over the tokens of a
    completion (`index_add` in loss.py), and the gradient of the prompt's last token, which predicts the first token of
    each completion (`index_select` in logprobs.py). An operation without a deterministic kernel raises an error.
    """
    if is_full:
        enable_full_determinism(seed)
    else:
        torch.use_deterministic_algorithms(False)  # it stays on from an earlier run in this process
        set_seed(seed)


def zero_stage(accelerator: Accelerator) -> int:
    """Stage of ZeRO, 0 without DeepSpeed."""
    plugin = accelerator.state.deepspeed_plugin if _is_deepspeed(accelerator) else None
    return int(plugin.zero_stage) if plugin else 0


def check_zero(recipe: Recipe, stage: int) -> None:
    """Raise InputError for an RLOO recipe that this stage of ZeRO (0 without DeepSpeed) cannot train."""
    refusal = zero3_refusal(recipe) if stage == 3 else None
    if refusal is not None:
        raise InputError(refusal)


def zero3_refusal(recipe: Recipe) -> str | None:
    """Return why ZeRO-3, which shards the weights, cannot train an RLOO recipe; None if it can."""
    config = RLOOConfig(**recipe.rloo)
    if config.bf16 and recipe.model.get("dtype", "bfloat16") == "float32":  # rejected in the middle of loading
        return (
            "rloo.bf16 under ZeRO-3 needs model.dtype bfloat16, and it is float32: weights are sharded as they are "
            "loaded, and DeepSpeed makes the float32 copies of those that are trained"
        )
    if config.beta and is_adapter(recipe):
        return (
            "a run that continues an adapter has no reference under ZeRO-3, which shards the adapter: launch it with "
            "ZeRO-2, set rloo.beta to 0, or merge the adapter first: rekatrain export RUN OUT"
        )
    if config.beta and (recipe.lora or {}).get("bias", "none") != "none":
        return (
            "lora.bias trains biases of the model itself, and a run with them has no reference under ZeRO-3, which "
            "shards them: launch it with ZeRO-2, set rloo.beta to 0, or lora.bias to none"
        )
    if config.fused_lm_head:
        return (
            "rloo.fused_lm_head reads the weight of the LM head outside its layer, where ZeRO-3 has gathered nothing: "
            "set it to false, or launch with ZeRO-2"
        )
    return None


def accumulating(accelerator: Accelerator, model: nn.Module, *, is_last: bool) -> AbstractContextManager[None]:
    """Context of a micro-batch: data-parallel gradients are exchanged once per update, with its last micro-batch."""
    return nullcontext() if is_last or _is_deepspeed(accelerator) else accelerator.no_sync(model)


def backward(accelerator: Accelerator, model: nn.Module, loss: Tensor, *, is_last: bool) -> None:
    """Add the gradient of a micro-batch's loss; `is_last` says that it completes the update."""
    if not _is_deepspeed(accelerator):
        accelerator.backward(loss)
        return
    engine: Any = model  # DeepSpeed's engine
    engine.set_gradient_accumulation_boundary(is_last)  # Accelerate would step after every call
    engine.backward(loss, scale_wrt_gas=False)


class GradientClipper:
    """Norm that a gradient is scaled down to: min(max_grad_norm, quantile of the norms of recent updates).

    Those norms are the ones before clipping. Zero norms, of updates whose groups all lacked variance, and norms that
    are not finite are left out. Reka Flash 3.1 was trained with "gradient clipping informed by effective gradient
    norms"; the quantile is our reading of it. The norms are part of a checkpoint.
    """

    def __init__(self, config: RLOOConfig) -> None:
        self._max_norm = config.max_grad_norm
        self._quantile = config.grad_norm_quantile
        self._norms: deque[float] = deque(maxlen=config.grad_norm_window)
        self._last_norm, self._last_limit = 0.0, config.max_grad_norm
        self.num_nonfinite = 0

    @property
    def limit(self) -> float:
        """Norm that the next update is clipped to."""
        if self._quantile is not None and len(self._norms) >= min(FIRST_NORMS, self._norms.maxlen or FIRST_NORMS):
            return min(self._max_norm, float(np.quantile(self._norms, self._quantile)))
        return self._max_norm

    def remember(self, norm: float) -> None:
        """Record an update's norm before clipping."""
        self._last_norm, self._last_limit = norm, self.limit
        if 0 < norm < math.inf:
            self._norms.append(norm)
        if not math.isfinite(norm):
            self.num_nonfinite += 1

    def metrics(self) -> dict[str, float]:
        """Norm of the last update's gradient before clipping, and the norm that it was clipped to.

        Both are those since the last call: a step without an update has the norm 0.
        """
        metrics = {"grad_norm": self._last_norm, "grad_norm_limit": self._last_limit}
        self._last_norm = 0.0
        return metrics

    def state_dict(self) -> dict[str, Any]:
        """State that the next update depends on; a checkpoint holds it."""
        return {"norms": list(self._norms)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        self._norms.extend(state["norms"])


def update_weights(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, clipper: GradientClipper
) -> None:
    """Clip the gradient's norm over all processes, take an optimizer step and clear the gradient.

    A gradient whose norm is not finite moves no weight; `clipper.num_nonfinite` counts it, on every process alike.
    """
    if not _is_deepspeed(accelerator):
        norm = float(accelerator.clip_grad_norm_(model.parameters(), clipper.limit))
        if math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad()
    else:
        engine: Any = model  # DeepSpeed's engine
        engine.optimizer.clip_grad = clipper.limit  # it clips within its step, where the shards' norms are combined
        engine.optimizer.check_grad_overflow = True  # it then drops an update whose norm is not finite
        engine.step()
        norm = float(engine.get_global_grad_norm())
    clipper.remember(norm)


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Context in which every process holds the whole of a model that ZeRO-3 shards, so that it can sample on its own.

    Each GPU then holds the whole model beside its shards (`rekatrain plan` counts it; with vLLM servers
    it is not needed). The hooks by which layers gather and drop their weights are off meanwhile: processes sample for
    as many tokens as their completions have, each on its own.
    """
    from trl.models.utils import add_hooks, remove_hooks

    with gathered(list(model.parameters())):
        remove_hooks(model)
        try:
            yield
        finally:
            add_hooks(model)


def frozen(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """Make a model that is not trained ready to run beside the policy: in its arithmetic, and at stage 3 sharded."""
    model.eval().requires_grad_(False)
    if zero_stage(accelerator) and accelerator.mixed_precision == "bf16":
        for parameter in model.parameters():  # buffers keep their dtype, as under DeepSpeed
            parameter.data = parameter.data.to(torch.bfloat16)
    if zero_stage(accelerator) < 3:
        return model
    import deepspeed

    config = copy.deepcopy(accelerator.state.deepspeed_plugin.deepspeed_config)
    sharding = {key: value for key, value in config["zero_optimization"].items() if value != "auto"}
    config["zero_optimization"] = {key: value for key, value in sharding.items() if key != "offload_optimizer"}
    engine, *_ = deepspeed.initialize(model=model, config=config)
    sharded: nn.Module = engine
    return sharded


def trained_weights(accelerator: Accelerator, model: nn.Module) -> dict[str, Tensor]:
    """Return the trained parameters by name, whole and on the host, on the main process; nothing on the others.

    Sharded parameters are gathered one by one: of a model with an adapter, the adapter alone.
    """
    whole = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with gathered([parameter]):
                if accelerator.is_main_process:
                    whole[name] = parameter.detach().cpu().clone()
    return whole


@contextmanager
def writable(accelerator: Accelerator, parameters: Iterable[nn.Parameter]) -> Iterator[bool]:
    """Context in which parameters are whole and may be written: by this process if it yields True.

    At stage 3 only the main process writes, and its values are then those of every process.
    """
    if zero_stage(accelerator) < 3:
        yield True
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(list(parameters), modifier_rank=0):
        yield accelerator.is_main_process


def _is_deepspeed(accelerator: Accelerator) -> bool:
    return bool(accelerator.distributed_type == DistributedType.DEEPSPEED)
