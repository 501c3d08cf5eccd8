"""Sequence classifiers of any family as reward models: loaded from a folder, run on micro-batches of similar lengths.

The file `reward_model.json` of a reward model's folder holds its template, whether it was trained on the reasoning too,
and the mean and standard deviation of its scores when it was exported.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from rekatrain.data.errors import InputError
from rekatrain.data.reward_model_input import RewardModelIds, Template
from rekatrain.data.tokenizer import load_classifier_tokenizer

logger = logging.getLogger(__name__)

CARD_FILE = "reward_model.json"
Dtype = Literal["float32", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class RewardModelCard:
    """The contents of `reward_model.json`.

    template:  the template in which the model reads an answer
    reasoning: True if the model judges the reasoning too
    mean, std: of its scores on `measured_on`; a reward is (score - mean) / std
    """

    template: Template
    reasoning: bool
    mean: float
    std: float
    measured_on: str

    def save(self, folder: Path) -> None:
        """Write the card into the folder."""
        (folder / CARD_FILE).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")


def read_card(folder: str) -> RewardModelCard | None:
    """Return the card in a model's folder; None if there is none. Raise InputError if it cannot be read."""
    file = Path(folder) / CARD_FILE
    if not file.is_file():
        return None
    try:
        return RewardModelCard(**json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{file} cannot be read: {error}; export the reward model again") from error


def load_classifier(
    folder: str, *, revision: str | None, dtype: Dtype, device: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a sequence classifier with its tokenizer, from a folder or the hub, ready to score."""
    if device.startswith("cuda") and int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise InputError(f"device is {device!r}, but this process sees {torch.cuda.device_count()} GPUs")
    tokenizer = load_classifier_tokenizer(folder, revision=revision)
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            folder, revision=revision, dtype=getattr(torch, dtype), output_loading_info=True
        )
    except (OSError, ValueError) as error:
        raise InputError(f"no classifier could be loaded from {folder!r}: {str(error).splitlines()[0]}") from error
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise InputError(
            f"{folder!r} is not a sequence classifier: it has no weights for {missing}, which would be random"
        )
    model.to(device).eval().requires_grad_(False)
    set_pad(model, tokenizer)
    return model, tokenizer


def set_pad(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Set the pad id of a model's config that has none: decoders read the score at the last token that is no pad."""
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id


def context_of(model: PreTrainedModel) -> int:
    """Return the model's context in tokens."""
    return int(getattr(model.config.get_text_config(), "max_position_embeddings", 0)) or 1_000_000


def label_names(model: PreTrainedModel) -> list[str]:
    """Return the names of the classifier's outputs, in order; a reward model has one."""
    return [str(name) for _, name in sorted((model.config.id2label or {}).items())]


def memory_of(model: torch.nn.Module) -> str:
    """Describe a model's parameters and their memory."""
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return f"{num_parameters:,} parameters, {num_bytes / 2**30:.2f} GiB"


def classify(model: PreTrainedModel, sequences: Sequence[RewardModelIds], *, micro_batch_tokens: int) -> torch.Tensor:
    """Return the logits [N, labels] in float32 on the CPU, in the order of `sequences`.

    Sequences are run in the order of their length, so that a micro-batch holds little padding. With padding it has at
    most `micro_batch_tokens` tokens, unless one sequence alone has more.
    """
    pad_id = model.config.get_text_config().pad_token_id
    takes_types = getattr(model.config, "type_vocab_size", 0) > 1
    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index].input_ids), reverse=True)
    logits_NC = torch.empty(len(sequences), len(label_names(model)))
    with torch.inference_mode():
        for indices in _micro_batches(sequences, order, micro_batch_tokens):
            longest = len(sequences[indices[0]].input_ids)
            ids_BT = torch.full((len(indices), longest), pad_id)
            types_BT, mask_BT = torch.zeros_like(ids_BT), torch.zeros_like(ids_BT)
            for b, index in enumerate(indices):
                length = len(sequences[index].input_ids)
                ids_BT[b, :length] = torch.tensor(sequences[index].input_ids)
                types_BT[b, :length] = torch.tensor(sequences[index].token_type_ids)
                mask_BT[b, :length] = 1
            inputs = {"input_ids": ids_BT, "attention_mask": mask_BT}
            if takes_types:
                inputs["token_type_ids"] = types_BT
            # A model that reads its weights layer by layer, in an export, has none on a device.
            device = torch.device("cpu") if model.device.type == "meta" else model.device
            output = model(**{name: tensor.to(device) for name, tensor in inputs.items()})
            logits_NC[indices] = output.logits.float().cpu()
    return logits_NC


def _micro_batches(
    sequences: Sequence[RewardModelIds], order: Sequence[int], micro_batch_tokens: int
) -> list[list[int]]:
    batches: list[list[int]] = []
    for index in order:
        longest = len(sequences[batches[-1][0]].input_ids) if batches else 0
        if batches and longest * (len(batches[-1]) + 1) <= micro_batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
