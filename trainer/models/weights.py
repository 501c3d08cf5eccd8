"""Compare the tensors of a model folder with the model that its config.json builds, before and after they are loaded.

transformers fills a tensor that is missing, renamed or of another shape with random numbers, and warns. Here it is an
error: from the headers of the files before a weight is read, and from the loader's report for all other formats.
"""

import copy
import re
import threading
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import logging as transformers_logging

from rekatrain.data.errors import InputError
from rekatrain.trainer.models.source import Source, read_adapter_config
from rekatrain.trainer.models.tied_weights import check_tied_files
from rekatrain.trainer.models.weight_files import ADAPTER, HOW_TO_COPY, check_weight_files, local_folder, read_header

# Buffers that older versions of transformers saved.
OLD_BUFFERS = re.compile(r"(.*\.)?(inv_freq|position_ids|masked_bias|attn\.bias)")
# PEFT's part of the names of an adapter's tensors, before the base's name of a module that is stored whole.
PEFT_PREFIX = "base_model.model."
# Not part of a causal model; an encoder's classifier may have it or not.
POOLER = re.compile(r"(.*\.)?pooler\..*")


def check_tensors(
    source: Source, revision: str | None, skeleton: PreTrainedModel, *, may_lack_head: bool = False
) -> list[str]:
    """Return the tensors that a classifier's files lack, and that are random before training; read headers alone.

    Raises InputError if the weights on this machine are not those of `skeleton`. A model of the hub that is not here
    yet is checked when it is loaded.

    skeleton:      the model that config.json builds, without weights
    may_lack_head: True for a classifier whose head is new
    """
    folder = local_folder(source.base, revision)
    if folder is None or not check_weight_files(folder):
        return []
    check_tied_files(source.base, folder, skeleton)
    if is_deepspeed_zero3_enabled():  # transformers then builds no model on the meta device
        return []
    with quiet_transformers(has_bar=False), readable(source.base):
        model_class = type(skeleton)
        loaded: Any = model_class.from_pretrained(  # with the report, a pair
            folder,
            config=skeleton.config,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    check_report(source.base, skeleton, loaded[1], may_lack_head=may_lack_head)
    if source.adapter is not None:
        header = check_adapter(source, skeleton)
        untrained = sorted(name for name in loaded[1]["missing_keys"] if f"{PEFT_PREFIX}{name}" not in header)
        if untrained:
            raise InputError(
                f"the adapter {source.adapter!r} has no {untrained[0]}, and neither has its base {source.base!r}: that "
                "part of the classifier would be random; train the reward model again, or copy the whole folder"
            )
    return sorted(loaded[1]["missing_keys"])


def check_report(base: str, model: PreTrainedModel, report: Mapping[str, Any], *, may_lack_head: bool = False) -> None:
    """Raise InputError for tensors that a loader did not find, could not use, or that have another shape.

    report: the loader's `output_loading_info`
    """
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        name, stored, wanted = mismatched[0]
        raise InputError(
            f"{base!r} stores {name} with the shape {list(stored)}, and its config.json makes it {list(wanted)}: the "
            "files are of two models"
        )
    missing = sorted(name for name in report["missing_keys"] if not (may_lack_head and _may_be_new(name, model)))
    if missing:
        raise InputError(
            f"{base!r} lacks {len(missing)} of the model's tensors, the first is {missing[0]}, which would be random: "
            f"{HOW_TO_COPY}"
        )
    unexpected = sorted(
        name
        for name in report["unexpected_keys"]
        if not OLD_BUFFERS.fullmatch(name) and not (may_lack_head and _is_other_head(name, model))
    )
    if unexpected:
        raise InputError(
            f"{base!r} stores {len(unexpected)} tensors that the model of its config.json does not have, the first is "
            f"{unexpected[0]}: the files are of two models"
        )


def check_adapter(source: Source, skeleton: PreTrainedModel) -> dict[str, Any]:  # JSON values
    """Raise InputError unless an adapter's tensors are those of its config on the model `skeleton`.

    Return the header of its weights.
    """
    adapter = Path(cast(str, source.adapter))
    header = read_header(adapter / ADAPTER)
    config = read_adapter_config(adapter)
    if config.task_type == "CAUSAL_LM" and not skeleton.can_generate():
        raise InputError(
            f"the adapter {str(adapter)!r} was trained on a language model (task_type CAUSAL_LM), and has no head of a "
            "classifier: name the adapter or the export of a reward run"
        )
    try:
        config.inference_mode = True
        with torch.device("meta"):
            model = get_peft_model(copy.deepcopy(skeleton), config)
        expected = {name: list(tensor.shape) for name, tensor in get_peft_model_state_dict(model).items()}
    except Exception as error:  # PEFT raises many classes for a config that does not fit the model
        raise InputError(
            f"the adapter {str(adapter)!r} does not fit its base {source.base!r}: {one_line(error)}"
        ) from error
    for name, shape in sorted(expected.items()):
        if name not in header:
            raise InputError(f"the adapter {str(adapter)!r} lacks the tensor {name}: {HOW_TO_COPY}")
        if header[name]["shape"] != shape:
            raise InputError(
                f"the adapter {str(adapter)!r} stores {name} with the shape {header[name]['shape']}, and its base "
                f"{source.base!r} makes it {shape}: it belongs to another base"
            )
    others = sorted(set(header) - set(expected))
    if others:
        raise InputError(
            f"the adapter {str(adapter)!r} stores {len(others)} tensors that {source.base!r} has no place for, the "
            f"first is {others[0]}: it belongs to another base"
        )
    return header


def check_finite(model: nn.Module, name: str) -> None:
    """Raise InputError if a loaded weight is NaN or infinite; under ZeRO-3 each process checks its shards."""
    for key, parameter in model.named_parameters():
        values = values_here(parameter)
        if values.is_floating_point() and not values.is_meta and not bool(torch.isfinite(values).all()):
            raise InputError(
                f"{name!r} has weights that are not finite, the first are in {key}: the model is broken; use an "
                "earlier checkpoint, or copy it again"
            )


def values_here(parameter: nn.Parameter) -> Tensor:
    """Return the values of a parameter that this process holds: under ZeRO-3 those of its shard.

    The last shards of a parameter end with padding, which DeepSpeed leaves as it finds the memory.
    """
    shard: Tensor | None = getattr(parameter, "ds_tensor", None)
    if shard is None:
        return parameter
    rank = torch.distributed.get_rank(parameter.ds_process_group)  # type: ignore[attr-defined]  # DeepSpeed's
    num_left: int = parameter.ds_numel - rank * shard.numel()  # type: ignore[attr-defined]
    return shard.flatten()[: max(0, num_left)]


def one_line(error: Exception, limit: int = 300) -> str:
    """Return the message of a library's error on one line, or its class if it has none."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


@contextmanager
def readable(base: str) -> Iterator[None]:
    """Turn what the libraries raise for a model that they cannot read into InputError."""
    try:
        yield
    except (InputError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:  # transformers, safetensors and huggingface_hub raise many unrelated classes
        raise InputError(f"no model could be loaded from {base!r}: {one_line(error)}") from error


# transformers' loader patches `PreTrainedModel.tie_weights` while it runs. Of two loads at once in two threads, the
# second would put the patch back as the original: no model of the process would tie its embeddings from then on.
_LOADING = threading.RLock()


@contextmanager
def quiet_transformers(*, has_bar: bool = True) -> Iterator[None]:
    """Silence the loader's table of tensors, which is an error here or, for a new head, no news; one load at a time.

    has_bar: False hides the progress bar, too, where only headers are read
    """
    with _LOADING:
        yield from _quiet_transformers(has_bar)


def _quiet_transformers(has_bar: bool) -> Iterator[None]:
    level, had_bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    if not has_bar:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if had_bar:
            transformers_logging.enable_progress_bar()


def load_adapter(model: nn.Module, adapter: str, **options: Any) -> PeftModel:
    """Put a stored adapter on its base; options: keywords of `PeftModel.from_pretrained`."""
    with readable(adapter):
        return PeftModel.from_pretrained(model, adapter, **options)


def _may_be_new(name: str, model: PreTrainedModel) -> bool:
    """Return True for a tensor of a classifier's head, which training starts from random numbers."""
    return not name.startswith(f"{model.base_model_prefix}.") or POOLER.fullmatch(name) is not None


def _is_other_head(name: str, model: PreTrainedModel) -> bool:
    """Return True for a stored tensor outside of the base of a classifier, such as a language model's head."""
    return POOLER.fullmatch(name) is not None or not _is_of_base(name, model)


def _is_of_base(name: str, model: PreTrainedModel) -> bool:
    parts: Collection[str] = [part for part, _ in model.base_model.named_children()]
    return name.removeprefix(f"{model.base_model_prefix}.").partition(".")[0] in parts
