"""Small tokenizers and models of other families, with the settings of their published files."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from tests.conftest import CORPUS

TIKTOKEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPACE = "▁"


def sentencepiece_tokenizer(bos: str | None, eos: str, *, prepends: bool = True, unk: str = "<unk>") -> Any:
    """BPE over ▁ with bytes as a fallback: Llama 2, Mistral, Phi 3 (`prepends`) and Gemma."""
    special = [unk, *([bos] if bos else []), eos]
    vocabulary = {token: index for index, token in enumerate([*special, *BYTES])}
    for character in sorted(set("".join(CORPUS).replace(" ", SPACE)) | {SPACE}):
        vocabulary.setdefault(character, len(vocabulary))
    merges = [(SPACE, "Y"), ("e", "s"), (f"{SPACE}Y", "es"), (SPACE, "4"), (SPACE, SPACE)]
    for left, right in merges:
        for part in (left, right, left + right):
            vocabulary.setdefault(part, len(vocabulary))
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token=unk, byte_fallback=True, fuse_unk=True))
    steps = [normalizers.Prepend(SPACE)] if prepends else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    back = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*back, *([decoders.Strip(" ", 1, 0)] if prepends else [])])
    return _finish(backend, special, bos, eos)


def metaspace_tokenizer(bos: str | None, eos: str) -> Any:
    """The form of the same tokenizers in newer files: a Metaspace pre-tokenizer and decoder."""
    tokenizer = sentencepiece_tokenizer(None, eos)
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first", split=False)
    metaspace = decoders.Metaspace(replacement=SPACE, prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), metaspace])
    return _finish(backend, [eos, *([bos] if bos else [])], bos, eos)


def byte_level_tokenizer(bos: str | None, eos: str, *, splits: Any = None, normalizer: Any = None) -> Any:
    """Byte-level BPE: Llama 3 and Phi 4 (tiktoken's pattern), Qwen (NFC), SmolLM (single digits)."""
    backend = Tokenizer(models.BPE())
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splits is None)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*([splits] if splits else []), level])
    backend.normalizer = normalizer
    backend.decoder = decoders.ByteLevel()
    special = [eos, *([bos] if bos else [])]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return _finish(backend, special, bos, eos)


def _finish(backend: Tokenizer, special: list[str], bos: str | None, eos: str) -> PreTrainedTokenizerFast:
    backend.add_special_tokens(special)
    if bos:
        pairs = [(bos, backend.token_to_id(bos))]
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=pairs)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)


def tiktoken_split() -> Any:
    """tiktoken's pattern as a pre-tokenizer."""
    return pre_tokenizers.Split(Regex(TIKTOKEN), behavior="isolated")


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}


@dataclass(frozen=True)
class Family:
    """A family: how its tokenizer and its model are made, and whether its texts begin with a bos token."""

    tokenizer: Callable[[], PreTrainedTokenizerFast]
    config: Callable[..., PretrainedConfig]
    has_bos: bool

    def build(self) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
        """Return a random model in float32 and its tokenizer."""
        tokenizer = self.tokenizer()
        torch.manual_seed(0)
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
        config = self.config(vocab_size=len(tokenizer), **SIZES, **ids)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32), tokenizer


FAMILIES = {
    "llama-2": Family(lambda: sentencepiece_tokenizer("<s>", "</s>"), LlamaConfig, True),
    "llama-2, newer file": Family(lambda: metaspace_tokenizer("<s>", "</s>"), LlamaConfig, True),
    "llama-3": Family(
        lambda: byte_level_tokenizer("<|begin_of_text|>", "<|end_of_text|>", splits=tiktoken_split()),
        LlamaConfig,
        True,
    ),
    "mistral": Family(
        lambda: sentencepiece_tokenizer("<s>", "</s>"),
        lambda **keys: MistralConfig(sliding_window=None, head_dim=8, **keys),
        True,
    ),
    "qwen-2.5": Family(
        lambda: byte_level_tokenizer(None, "<|endoftext|>", splits=tiktoken_split(), normalizer=normalizers.NFC()),
        Qwen2Config,
        False,
    ),
    "qwen-3": Family(
        lambda: byte_level_tokenizer(None, "<|endoftext|>", splits=tiktoken_split(), normalizer=normalizers.NFC()),
        lambda **keys: Qwen3Config(head_dim=8, **keys),
        False,
    ),
    "gemma": Family(
        lambda: sentencepiece_tokenizer("<bos>", "<eos>", prepends=False),
        lambda **keys: GemmaConfig(head_dim=8, **keys),
        True,
    ),
    "phi-3": Family(lambda: sentencepiece_tokenizer(None, "<|endoftext|>"), Phi3Config, False),
    "phi-4": Family(lambda: byte_level_tokenizer(None, "<|endoftext|>", splits=tiktoken_split()), Phi3Config, False),
    "smollm": Family(
        lambda: byte_level_tokenizer(None, "<|im_end|>", splits=pre_tokenizers.Digits(individual_digits=True)),
        LlamaConfig,
        False,
    ),
}
GEMMA_2 = Family(
    lambda: sentencepiece_tokenizer("<bos>", "<eos>", prepends=False),
    lambda **keys: Gemma2Config(head_dim=8, **keys),
    True,
)
GEMMA_3 = Family(
    lambda: sentencepiece_tokenizer("<bos>", "<eos>", prepends=False),
    lambda **keys: Gemma3TextConfig(head_dim=8, **keys),
    True,
)
