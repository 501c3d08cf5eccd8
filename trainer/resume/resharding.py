"""Write a checkpoint's optimizer state into a live optimizer of another layout: one piece, or any shards of ZeRO.

Each process reads the whole weights and its own ranges of the moments from mapped files. Nothing is written to disk,
and the host holds no more than one parameter at a time beside the optimizer. The numbers are the checkpoint's, bit for
bit.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel

from rekatrain.data.errors import InputError
from rekatrain.trainer.resume.saved_optimizer import MOMENTS, WEIGHT, SavedOptimizer, read_optimizer

Parameters = Mapping[str, nn.Parameter]


def restore_converted(
    checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, names: Sequence[str] | None = None
) -> None:
    """Load trained weights and AdamW's state from a checkpoint of any layout; learning rates stay.

    model:     with the names of its parameters as when it was saved: not wrapped
    optimizer: as Accelerate prepared it
    names:     trained parameters in the order of the optimizer's groups; by default that of the model

    Raises InputError for a checkpoint of another model, and for an optimizer that DeepSpeed swaps to disk.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    keys = keys_in_weights(model)
    saved = read_optimizer(checkpoint, {name: keys[name] for name in names or trained})
    saved.check_names({name: getattr(parameter, "ds_numel", parameter.numel()) for name, parameter in trained.items()})
    inner: Any = getattr(optimizer, "optimizer", optimizer)  # DeepSpeed's or torch's, within Accelerate's
    with torch.no_grad():
        if isinstance(inner, torch.optim.Optimizer):
            _write_plain(saved, trained, inner)
        elif hasattr(inner, "single_partition_of_fp32_groups"):
            _write_partitions(saved, trained, inner, inner.single_partition_of_fp32_groups)
        elif hasattr(inner, "fp32_groups_flat_partition"):  # ZeRO-1 that accumulates bfloat16 gradients in float32
            _write_partitions(saved, trained, inner, inner.fp32_groups_flat_partition)
        elif hasattr(inner, "fp32_partitioned_groups_flat") and not inner.swap_optimizer:
            _write_shards(saved, trained, inner)
        else:
            raise InputError(
                f"the optimizer of {str(checkpoint)!r} cannot be converted for this launch's {type(inner).__name__}: "
                "use one of the launch files of recipes/accelerate"
            )


def keys_in_weights(model: nn.Module) -> dict[str, str]:
    """Return the names of a model's trained parameters, with their keys in the safetensors files of a checkpoint.

    The model may be part of another module; its name is then no part of the keys. PEFT saves an adapter with keys that
    lack the adapter's name, and more for some kinds of it.
    """
    models = ((name, part) for name, part in model.named_modules() if isinstance(part, PreTrainedModel | PeftModel))
    prefix, part = next(models, ("", model))
    trained = {name: parameter for name, parameter in part.named_parameters() if parameter.requires_grad}
    saved: dict[str, nn.Parameter] = trained
    if isinstance(part, PeftModel):
        saved = get_peft_model_state_dict(part, state_dict=dict(part.named_parameters()), save_embedding_layers=False)
    keys = {id(parameter): key for key, parameter in saved.items()}
    return {f"{prefix}.{name}".removeprefix("."): keys[id(parameter)] for name, parameter in trained.items()}


def _write_plain(saved: SavedOptimizer, trained: Parameters, optimizer: torch.optim.Optimizer) -> None:
    names = {parameter: name for name, parameter in trained.items()}
    states: dict[int, dict[str, Tensor]] = {}
    for index, parameter in enumerate(parameter for group in optimizer.param_groups for parameter in group["params"]):
        name = names[parameter]
        parameter.copy_(saved.read(WEIGHT, name).view_as(parameter))
        if saved.step:
            states[index] = {key: saved.read(key, name).view_as(parameter).to(parameter.device) for key in MOMENTS}
            states[index]["step"] = torch.tensor(saved.step)
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def _write_partitions(saved: SavedOptimizer, trained: Parameters, zero: Any, partitions: list[Tensor]) -> None:
    """Write into ZeRO 1 or 2: whole weights, and the fragments of float32 weights and moments that this process has."""
    if saved.step:
        for flat in partitions:
            zero.optimizer.state[flat] = _new_state(zero.optimizer, flat, saved.step)
        zero._lazy_init_hp_params_optimizer_state()  # as after DeepSpeed's first step: it links fragments to moments
    for name, parameter in trained.items():
        parameter.copy_(saved.read(WEIGHT, name).view_as(parameter))
        mapping: Any = parameter._hp_mapping  # type: ignore[attr-defined]  # DeepSpeed's
        if mapping is None:  # the whole of the parameter is in the partitions of others
            continue
        start, size = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
        mapping.get_hp_fragment().copy_(saved.read(WEIGHT, name, start, start + size))
        for key in MOMENTS if saved.step else ():
            mapping.get_hp_fragment(key).copy_(saved.read(key, name, start, start + size))


def _write_shards(saved: SavedOptimizer, trained: Parameters, zero: Any) -> None:
    """Write into ZeRO-3: each parameter is split evenly over the processes, with padding at its end."""
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    rank = torch.distributed.get_rank()
    if saved.step:
        for flat in zero.fp32_partitioned_groups_flat:
            zero.optimizer.state[flat] = _new_state(zero.optimizer, flat, saved.step)
    for name, parameter in trained.items():
        with GatheredParameters([parameter], modifier_rank=0):
            if rank == 0:
                parameter.copy_(saved.read(WEIGHT, name).view_as(parameter))
        size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]  # DeepSpeed's
        part = torch.zeros(size)
        for key in (WEIGHT, *MOMENTS) if saved.step else (WEIGHT,):
            values = saved.read(key, name, rank * size, (rank + 1) * size)
            part.zero_()[: len(values)] = values
            if key == WEIGHT:
                safe_set_local_fp32_param(parameter, part)
            else:
                safe_set_local_optimizer_state(parameter, part, key)


def _new_state(optimizer: torch.optim.Optimizer, flat: Tensor, step: float) -> dict[str, Any]:
    """Return AdamW's state of a flat tensor after `step` updates, with moments of 0; its first update would make it."""
    group = optimizer.param_groups[0]
    on_device = group.get("fused") or group.get("capturable")
    count = torch.tensor(step, device=flat.device if on_device else "cpu")
    # DeepSpeed's AdamW on the CPU counts in an int.
    return {
        "step": count if isinstance(optimizer, torch.optim.AdamW) else int(step),
        **{key: torch.zeros_like(flat) for key in MOMENTS},
    }
