"""Check that every name in `lora:` is a part of the model: PEFT ignores a name of a list if another one matches."""

import re
from collections.abc import Collection, Mapping
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import layer as lora_layers
from peft.utils import ModulesToSaveWrapper
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn
from transformers import PreTrainedModel

from rekatrain.data.errors import InputError
from rekatrain.trainer.models.loraplus import lr_ratio
from rekatrain.trainer.models.weights import PEFT_PREFIX


def check_targets(adapted: PeftModel, lora: Mapping[str, Any]) -> None:
    """Raise InputError for a name that no module has, a layer that does not exist, and a tied weight with an adapter.

    adapted: the model with its adapter; it needs no weights
    """
    base = adapted.get_base_model()
    assert isinstance(base, PreTrainedModel)
    # PEFT puts its own modules around and into those of the model.
    modules = {re.sub(r"\.(base_layer|original_module)\b", "", name) for name, _ in base.named_modules()}
    parameters = {name.replace(".base_layer", "") for name, _ in base.named_parameters()}
    targeted = set(adapted.base_model.targeted_module_names)  # type: ignore[arg-type]  # peft is half typed
    both = sorted(_listed(lora, "target_modules") & _listed(lora, "modules_to_save"))
    if both:
        raise InputError(
            f"lora.target_modules and lora.modules_to_save both name {both[0]}: an adapter on a weight that is trained "
            "whole adds nothing; take it out of one of them"
        )
    for key, names in (
        ("target_modules", targeted),
        ("exclude_modules", modules),
        ("modules_to_save", modules),
        ("target_parameters", parameters),
    ):
        for name in sorted(_listed(lora, key)):
            if not _has(names, name):
                if key == "target_modules" and _has(modules, name):
                    raise InputError(
                        f"lora.target_modules names {name}, which exclude_modules or layers_to_transform leave out "
                        "everywhere: take it out"
                    )
                raise InputError(f"lora.{key} names {name}, which no part of the model is called; {_known(names)}")
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in lora.get(key) or {}:
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in targeted):
                raise InputError(f"lora.{key} has {pattern}, which no module with an adapter is called")
    layers = lora.get("layers_to_transform")
    num_layers = base.config.get_text_config().num_hidden_layers
    for layer in [layers] if isinstance(layers, int) else layers or []:
        if layer >= num_layers:
            raise InputError(f"lora.layers_to_transform names layer {layer}; the model has {num_layers}, from 0 on")
    _check_embeddings(base, targeted, "target_modules")
    if lr_ratio(lora) is not None:
        embeddings = [name for name in targeted if isinstance(base.get_submodule(name), lora_layers.Embedding)]
        if embeddings:
            raise InputError(
                f"lora.loraplus_lr_ratio has no rate for an adapter on {sorted(embeddings)[0]}: LoRA+ trains "
                "embeddings at a separate, much smaller one; take it out of lora.target_modules, or remove the ratio"
            )
    parameters_with_adapter = set(adapted.base_model.targeted_parameter_names)  # type: ignore[arg-type]
    _check_embeddings(base, {name.rpartition(".")[0] for name in parameters_with_adapter}, "target_parameters")


def check_head(classifier: nn.Module, lora: Mapping[str, Any]) -> None:
    """Raise InputError for an adapter on the head of a classifier, which is new and is trained whole.

    classifier: the model without an adapter; it needs no weights
    """
    heads = [name for name, _ in classifier.named_children() if name in SEQ_CLS_HEAD_NAMES]
    for key in ("target_modules", "target_parameters"):
        for name in sorted(_listed(lora, key)):
            if _has(heads, name.removesuffix(".weight")):
                raise InputError(
                    f"lora.{key} names {name}, the head of the reward model, which is new and is trained whole with "
                    "every adapter: take it out"
                )


def check_new_parts(new: Collection[str], adapted: PeftModel) -> None:
    """Raise InputError for a part of a classifier that is new, and that the adapter neither trains nor saves.

    PEFT does so for the last layer alone. An encoder whose files lack its pooler, for one, would get another random one
    each time that it is loaded.

    new: names of the tensors that the model's files lack
    """
    saved = {name.removeprefix(PEFT_PREFIX) for name in get_peft_model_state_dict(adapted)}
    lost = sorted(set(new) - saved)
    if lost:
        part = lost[0].rpartition(".")[0]
        name = next((each for each in part.split(".") if each in ("pooler", "sequence_summary")), part.split(".")[-1])
        raise InputError(
            f"the model's files lack {lost[0]}, which is random and which an adapter neither trains nor saves: add "
            f"lora.modules_to_save: [{name}], or remove the section lora"
        )


def check_quantized_targets(adapted: PeftModel) -> None:
    """Raise InputError for a layer of `lora.modules_to_save` that `model.quantization_config` would pack."""
    base = adapted.get_base_model()
    assert isinstance(base, PreTrainedModel)
    for name, module in base.named_modules():
        is_head = name in SEQ_CLS_HEAD_NAMES or (base.can_generate() and module is base.get_output_embeddings())
        if isinstance(module, ModulesToSaveWrapper) and isinstance(module.original_module, nn.Linear) and not is_head:
            raise InputError(
                f"lora.modules_to_save includes {name}, whose weight model.quantization_config packs: name it in "
                "lora.target_modules"
            )


def _has(names: Collection[str], end: str) -> bool:
    """Return True if one of the names is `end`, or ends with it after a dot."""
    return any(name == end or name.endswith(f".{end}") for name in names)


def _listed(lora: Mapping[str, Any], key: str) -> set[str]:
    """Return the names of a list; a text is a pattern, which PEFT checks itself."""
    names = lora.get(key)
    return set(names) if isinstance(names, list) else set()


def _check_embeddings(base: PreTrainedModel, targeted: Collection[str], key: str) -> None:
    """Raise InputError for modules with an adapter, named by `lora.KEY`, that are the output layer or tied to it."""
    if not base.can_generate():
        return
    if not base.config.get_text_config().tie_word_embeddings:
        heads = [name for name in targeted if base.get_submodule(name) is base.get_output_embeddings()]
        if heads:
            raise InputError(
                f"lora.{key} includes {heads[0]}, the output layer, whose weight the losses read without an "
                f"adapter: take it out, or train the whole weight: modules_to_save: [{heads[0]}]"
            )
        return
    for name in sorted(targeted):
        if name.rpartition(".")[2] in ("embed_tokens", "lm_head", "wte", "embed_out"):
            raise InputError(
                f"lora.{key} includes {name}, whose weight the input and the output share "
                "(tie_word_embeddings): the merged model would change both. Take it out, or train the whole weight: "
                f"modules_to_save: [{name.rpartition('.')[2]}]"
            )


def _known(names: Collection[str]) -> str:
    ends = {name.rpartition(".")[2] for name in names}
    shown = sorted(end for end in ends if end and not end.isdecimal() and not end.startswith(("lora_", "default")))
    return f"there are {', '.join(shown[:20])}" if shown else "there is none"
