"""The tensors of a checkpoint, read one at a time: an adapter is merged into each tensor as it is read.

The whole model is never in memory. PEFT's own layers merge: they are built without weights, and get the weight of one
layer at a time. So every kind of adapter is merged as PEFT's `merge_and_unload` does it, bit for bit.
"""

import ctypes
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from accelerate.hooks import attach_align_device_hook, remove_hook_from_submodules
from peft import set_peft_model_state_dict
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from rekatrain.data.errors import InputError
from rekatrain.trainer.export.stored_tensors import StoredTensors, open_tensors
from rekatrain.trainer.models.source import Source
from rekatrain.trainer.models.weight_files import ADAPTER
from rekatrain.trainer.models.weights import load_adapter, quiet_transformers, readable

# A parameter of glibc's mallopt.
M_MMAP_THRESHOLD = -3
# Names that PEFT puts into those of the model.
PEFT_NAMES = re.compile(r"^base_model\.model\.|\.(?:base_layer|original_module|modules_to_save\.default)(?=\.|$)")


class LazyWeights(Mapping[str, Tensor]):
    """The tensors of a model, with its adapter merged in float32: an item is computed when it is read.

    dtype: of the items, float32 at first
    model: the model without weights; its config says if the head is tied
    tied:  names that are no items, each with the name whose tensor it shares
    """

    def __init__(self, source: Source, *, auto_class: Any = AutoModelForCausalLM, **options: Any) -> None:
        """Open the files of a source.

        auto_class: transformers' class for the model; options: keywords of its config, such as num_labels
        """
        _return_memory_at_once()
        self.dtype = torch.float32
        self._others: list[LazyWeights] = []
        self._source = source
        with readable(source.base), quiet_transformers():
            config = AutoConfig.from_pretrained(source.base, revision=source.revision, **options)
        self.model = _empty(auto_class, config)
        self._shapes = {name: tensor.shape for name, tensor in self.model.state_dict().items()}
        self._layers: dict[str, list[BaseTunerLayer]] = {}
        self._trained: dict[str, Tensor] = {}
        if source.adapter is not None:
            self._open_adapter(_empty(auto_class, config), source.adapter)
        shared: dict[str, str] = getattr(self.model, "all_tied_weights_keys", None) or {}
        # A trained copy of the embeddings (modules_to_save) is no longer the head's, and the reverse.
        self._untied = {name: of for name, of in shared.items() if name in self._trained or of in self._trained}
        self.tied = {name: of for name, of in shared.items() if name not in self._untied}
        if self._untied:
            self.model.config.get_text_config().tie_word_embeddings = False
        needed = {self._untied.get(name, name) for name in self if name not in self._trained}
        self._stored = open_tensors(source, auto_class, needed, **options)

    @property
    def is_streamed(self) -> bool:
        """True if the base is read from its files tensor by tensor; False if transformers loaded it whole."""
        return isinstance(self._stored, StoredTensors)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._read(name)
        if self._others:
            mean = tensor.double()
            for other in self._others:
                mean += other._read(name)
            tensor = (mean / (1 + len(self._others))).float()
        return tensor.to(self.dtype)

    def _read(self, name: str) -> Tensor:
        """Return a tensor in float32, merged."""
        name = self.tied.get(name, name)
        if name in self._trained:
            tensor = self._trained[name].clone()
        else:
            tensor = self._stored[self._untied.get(name, name)].float()
            if not self.is_streamed:  # the base's own tensor, which a merge in place would change
                tensor = tensor.clone()
        for layer in self._layers.get(name, []):
            tensor = _merge(layer, name.rpartition(".")[2], tensor)
        lowest, highest = torch.aminmax(tensor)  # NaN if one is; torch.isfinite would need two more tensors
        if not math.isfinite(lowest) or not math.isfinite(highest):
            raise InputError(
                f"{self._source.folder!r} has weights that are not finite, the first are in {name}: the model is "
                "broken; use an earlier checkpoint, or copy it again"
            )
        return tensor

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._shapes if name not in self.tied)

    def __len__(self) -> int:
        return len(self._shapes) - len(self.tied)

    def averaged(self, others: Sequence["LazyWeights"]) -> "LazyWeights":
        """Return the mean of these tensors and those of other checkpoints, computed in float64, in float32."""
        weights = copy(self)
        weights._others = list(others)
        return weights

    def rounded(self, dtype: torch.dtype) -> "LazyWeights":
        """Return the same tensors in the dtype in which they will be stored."""
        weights = copy(self)
        weights.dtype = dtype
        return weights

    def without_data(self) -> dict[str, Tensor]:
        """Return the names and shapes, as tensors on the meta device."""
        return {name: torch.empty(self._shapes[name], dtype=self.dtype, device="meta") for name in self}

    def _open_adapter(self, skeleton: PreTrainedModel, adapter: str) -> None:
        # PEFT moves an adapter to the device of its base. A view of one zero is on the CPU and needs no memory.
        zero = torch.zeros(())
        for module in skeleton.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(zero.expand(parameter.shape), requires_grad=False))
        peft = load_adapter(skeleton, adapter, low_cpu_mem_usage=True, torch_device="cpu")
        # An adapter on embeddings stores them too, in the base's dtype, to which PEFT has just rounded A and B.
        stored = load_file(Path(adapter) / ADAPTER)
        set_peft_model_state_dict(peft, {name: stored[name] for name in stored if ".base_layer." not in name})
        for name, parameter in peft.named_parameters():
            if (
                parameter.data_ptr() != zero.data_ptr() and ".lora_" not in name
            ):  # of modules_to_save, a bias, or an embedding
                self._trained[PEFT_NAMES.sub("", name)] = parameter.detach().float()
        for name, module in peft.named_modules():
            if isinstance(module, BaseTunerLayer):
                attribute = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
                self._layers.setdefault(f"{PEFT_NAMES.sub('', name)}.{attribute}", []).append(module)


@contextmanager
def streaming(weights: LazyWeights, device: str = "cpu") -> Iterator[PreTrainedModel]:
    """Give a model that runs in float32 on a device: each layer reads its tensors when it is called, and drops them."""
    model = weights.model
    attach_align_device_hook(model, execution_device=torch.device(device), offload=True, weights_map=weights)
    try:
        yield model
    finally:
        remove_hook_from_submodules(model)


def _return_memory_at_once() -> None:
    """Let glibc give each tensor of 1 MB or more back when it is freed: it keeps tensors below 32 MB by default."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):  # musl has none
        libc.mallopt(M_MMAP_THRESHOLD, 2**20)


def _empty(auto_class: Any, config: PretrainedConfig) -> PreTrainedModel:
    """Return a model whose parameters have no data; its buffers, such as rotary frequencies, have theirs."""
    with quiet_transformers(), init_empty_weights(include_buffers=False):
        return cast(PreTrainedModel, auto_class.from_config(config, dtype=torch.float32).eval())


def _merge(layer: BaseTunerLayer, attribute: str, weight: Tensor) -> Tensor:
    """Merge the adapter of one of PEFT's layers into a weight, in place."""
    base: Any = layer.get_base_layer()
    empty = getattr(base, attribute)
    setattr(base, attribute, nn.Parameter(weight, requires_grad=False))
    layer.merge()
    merged = getattr(base, attribute).data
    setattr(base, attribute, empty)
    layer.merged_adapters.clear()
    return cast(Tensor, merged)
