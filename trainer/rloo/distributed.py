"""What differs where DeepSpeed carries the gradients and the optimizer, in one place; elsewhere Accelerate alone does.

ZeRO (arXiv 1910.02054) shards the optimizer (stage 1), the gradients too (2), the weights too (3). At stage 3 every
forward and backward of a layer is an exchange between all processes, at stage 2 every backward: processes must make the
same passes in the same order (`equal_passes` in batches.py), and only whole weights can be sampled from.
"""

import copy
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from rekatrain.data.errors import InputError
from rekatrain.trainer.launch import adapt_to_device, check_engine, read_launch
from rekatrain.trainer.rloo.gather import gathered
from torch import Tensor, nn


def make_accelerator(*, bf16: bool) -> Accelerator:
    """Accelerate for one process, data parallelism or ZeRO; InputError unless it is what was launched."""
    launch = read_launch()
    has_gpu, is_deepspeed = torch.cuda.is_available(), launch.engine == "deepspeed"
    accelerator = Accelerator(
        # Without a GPU, `Accelerator()` would leave launched processes unconnected and train each alone, silently;
        # under DeepSpeed `cpu=True` would turn it off as silently.
        cpu=not has_gpu and not is_deepspeed,
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if is_deepspeed and not has_gpu else [],
        mixed_precision="bf16" if bf16 else None,
        step_scheduler_with_optimizer=False,
    )
    check_engine(launch, accelerator)
    if is_deepspeed:
        plugin = accelerator.state.deepspeed_plugin
        adapt_to_device(plugin)
        # DeepSpeed wants sizes, but micro-batches are laid out by tokens and their denominators are the step's; where
        # an update ends and how far its gradient is clipped is said below.
        plugin.deepspeed_config.update(
            train_micro_batch_size_per_gpu=1,
            gradient_accumulation_steps=1,
            train_batch_size=accelerator.num_processes,
            gradient_clipping=0.0,
        )
    return accelerator


def zero_stage(accelerator: Accelerator) -> int:
    """The stage of ZeRO, 0 without DeepSpeed."""
    plugin = accelerator.state.deepspeed_plugin if _is_deepspeed(accelerator) else None
    return int(plugin.zero_stage) if plugin else 0


def check_dtype(accelerator: Accelerator, dtype: str, *, bf16: bool) -> None:
    """Raise InputError where ZeRO-3 would refuse a model's `dtype` in the midst of things."""
    if zero_stage(accelerator) == 3 and dtype == "float32" and bf16:
        raise InputError(
            "rloo.bf16 under ZeRO-3 goes with model.dtype bfloat16: weights are sharded as they are loaded, and "
            "DeepSpeed makes the float32 copies of those that are trained"
        )


def accumulating(accelerator: Accelerator, model: nn.Module, *, is_last: bool) -> AbstractContextManager[None]:
    """Around a micro-batch: data-parallel gradients travel between processes once an update, with the last one."""
    return nullcontext() if is_last or _is_deepspeed(accelerator) else accelerator.no_sync(model)


def backward(accelerator: Accelerator, model: nn.Module, loss: Tensor, *, is_last: bool) -> None:
    """Add the gradient of a micro-batch's loss to its update; `is_last`: it completes the update."""
    if not _is_deepspeed(accelerator):
        accelerator.backward(loss)
        return
    engine: Any = model  # DeepSpeed's engine
    engine.set_gradient_accumulation_boundary(is_last)  # Accelerate would step after every call
    engine.backward(loss, scale_wrt_gas=False)


def update_weights(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float
) -> float:
    """Clip the gradient's norm, over all processes, step and clear -> the norm before."""
    if not _is_deepspeed(accelerator):
        norm = float(accelerator.clip_grad_norm_(model.parameters(), max_norm))
        optimizer.step()
        optimizer.zero_grad()
        return norm
    engine: Any = model  # DeepSpeed's engine
    engine.optimizer.clip_grad = max_norm  # within its step, where the norms of the shards are put together
    engine.step()
    return float(engine.get_global_grad_norm())


@contextmanager
def whole_weights(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """Within it, every process holds the whole model, for as long as it samples by itself.

    At ZeRO stage 3 that takes the memory of the model on each GPU beside its shards (`rekatrain plan` says whether it
    is there; servers that sample need none of it). The hooks by which layers fetch and drop their weights are off
    meanwhile: processes sample for as many tokens as their completions have, each by itself.
    """
    if zero_stage(accelerator) < 3:
        yield
        return
    from trl.models.utils import add_hooks, remove_hooks

    with gathered(list(model.parameters())):
        remove_hooks(model)
        try:
            yield
        finally:
            add_hooks(model)


def frozen(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """A model that is not trained, made ready to run beside the one that is: in its arithmetic, at stage 3 sharded."""
    model.eval().requires_grad_(False)
    if zero_stage(accelerator) and accelerator.mixed_precision == "bf16":
        for parameter in model.parameters():  # buffers stay, as DeepSpeed leaves them
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
    """The trained parameters by name, whole and on the host, on the main process; empty on the others.

    Sharded ones are gathered one by one: of a model with an adapter, the adapter alone.
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
    """Parameters whole, to be written: yields whether by this process; what it writes is then every process's."""
    if zero_stage(accelerator) < 3:
        yield True
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(list(parameters), modifier_rank=0):
        yield accelerator.is_main_process


def autocast(accelerator: Accelerator) -> AbstractContextManager[None]:
    """The arithmetic of a prepared model's forward, for a call that does not go through it."""
    # DeepSpeed has cast the weights themselves.
    return nullcontext() if _is_deepspeed(accelerator) else accelerator.autocast()


def _is_deepspeed(accelerator: Accelerator) -> bool:
    return bool(accelerator.distributed_type == DistributedType.DEEPSPEED)
