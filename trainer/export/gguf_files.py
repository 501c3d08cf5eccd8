"""`--as gguf`: one GGUF file per requested type, each loaded and compared by llama.cpp in a fresh process.

gguf_model.py has the layout, gguf_types.py the types of the tensors, gguf_tokenizer.py the tokenizer.
"""

import logging
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerBase

from rekatrain.data.errors import InputError
from rekatrain.data.tokenizer import load_tokenizer
from rekatrain.trainer.export.folders import save_tokenizer
from rekatrain.trainer.export.gguf_type_names import GGUF_TYPES, MAX_KL
from rekatrain.trainer.export.lazy_weights import LazyWeights
from rekatrain.trainer.export.probe import verify_logprobs
from rekatrain.trainer.export.publish import final_name
from rekatrain.trainer.models.source import Source
from rekatrain.trainer.models.weights import readable

logger = logging.getLogger(__name__)

PACKAGES = ("gguf", "xllamacpp")


def check_convertible(source: Source, quantize: list[str]) -> None:
    """Raise InputError for missing packages, wrong types, and a model or tokenizer without a GGUF form."""
    missing = [package for package in PACKAGES if find_spec(package) is None]
    if missing:
        raise InputError(f"--as gguf needs {' and '.join(missing)}: pip install 'rekatrain[gguf]'")
    unknown = [file_type for file_type in quantize if file_type not in GGUF_TYPES]
    if unknown:
        raise InputError(f"--quantize {' '.join(unknown)}: the types are {', '.join(GGUF_TYPES)}")
    if len(set(quantize)) < len(quantize):
        raise InputError(f"--quantize names a type twice: {' '.join(quantize)}")
    from rekatrain.trainer.export.gguf_model import check_architecture
    from rekatrain.trainer.export.gguf_tokenizer import find_pre_tokenizer

    with readable(source.base):
        config = AutoConfig.from_pretrained(source.base, revision=source.revision)
    check_architecture(config)
    find_pre_tokenizer(load_tokenizer(source.folder))


def write_gguf_files(
    folder: Path,
    weights: LazyWeights,
    tokenizer: PreTrainedTokenizerBase,
    types: list[str],
    probe: Tensor,
    logprobs: Tensor,
    checkpoint: Path,
    max_kl: float | None = None,
) -> None:
    """Write and verify model-TYPE.gguf for each type; write the tokenizer too, for clients that count tokens.

    checkpoint:      folder with the log-probabilities of training
    max_kl:          in place of the type's limit, in nats per token
    probe, logprobs: ids [1, L], and the model's log-probabilities [L, V] of every next token after each
    """
    from rekatrain.trainer.export.gguf_model import padded_size, write_gguf

    folder.mkdir(parents=True)
    save_tokenizer(tokenizer, folder)
    for file_type in types:
        size = weights.model.config.intermediate_size
        if "_k" in file_type and padded_size(size) != size:
            logger.info("%s: intermediate size %d padded with zeros to %d", file_type, size, padded_size(size))
            size = padded_size(size)
        file = folder / f"model-{file_type}.gguf"
        name = final_name(folder)
        write_gguf(file, weights, tokenizer, file_type=file_type, name=name, intermediate_size=size)
        limit = MAX_KL[file_type] if max_kl is None else max_kl
        module = "rekatrain.trainer.export.verify_gguf"
        verify_logprobs(file, probe, logprobs, module=module, checkpoint=checkpoint, max_kl=limit)
