"""`--as gguf`: one GGUF file for each type asked for, each loaded by llama.cpp in another process and compared.

The layout is gguf_model.py's, the types are gguf_types.py's, the tokenizer is gguf_tokenizer.py's.
"""

import logging
from importlib.util import find_spec
from pathlib import Path

from rekatrain.data.errors import InputError
from rekatrain.data.tokenizer import load_tokenizer
from rekatrain.trainer.export.folders import save_tokenizer
from rekatrain.trainer.export.probe import prove
from rekatrain.trainer.models import Source
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PACKAGES = {"gguf": "gguf", "xllamacpp": "xllamacpp"}


def check_convertible(source: Source, quantize: list[str]) -> None:
    """Raise InputError where a package is missing, or where model or tokenizer have no GGUF form."""
    missing = [package for module, package in PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise InputError(f"--as gguf needs {' and '.join(missing)}: pip install 'rekatrain[gguf]'")
    if len(set(quantize)) < len(quantize):
        raise InputError(f"--quantize names a type twice: {' '.join(quantize)}")
    from rekatrain.trainer.export.gguf_model import check_architecture
    from rekatrain.trainer.export.gguf_tokenizer import find_pre_tokenizer

    check_architecture(AutoConfig.from_pretrained(source.base))
    find_pre_tokenizer(load_tokenizer(source.folder))


def write_gguf_files(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    types: list[str],
    probe: Tensor,
    logprobs: Tensor,
) -> None:
    """Write model-TYPE.gguf for each type, and the tokenizer for clients that count tokens.

    probe, logprobs: ids [1, L] and the model's log-probabilities [L, V] after each
    """
    from rekatrain.trainer.export.gguf_model import padded_size, write_gguf

    folder.mkdir(parents=True)
    save_tokenizer(tokenizer, folder)
    for file_type in types:
        size = model.config.intermediate_size
        if "_k" in file_type and padded_size(size) != size:
            logger.info("%s: intermediate size %d padded with zeros to %d", file_type, size, padded_size(size))
            size = padded_size(size)
        file = folder / f"model-{file_type}.gguf"
        name = folder.name.removesuffix(".partial")
        write_gguf(file, model, tokenizer, file_type=file_type, name=name, intermediate_size=size)
        prove(file, probe, logprobs, module="rekatrain.trainer.export.verify_gguf")
