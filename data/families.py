"""Tokenizers of other families: what is adapted as one is loaded, and the check that all stages share.

SentencePiece tokenizers (Llama 2, Mistral, Phi 3) put a space before any text. A completion would begin with two: the
one after `assistant:`, and theirs. The loaded tokenizer adds none, and its decoder removes none, also in what a run
saves and exports: training, sampling and serving agree. The first word of a prompt then has no space before it.
"""

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from rekatrain.data.errors import InputError

if TYPE_CHECKING:  # importing it takes a second
    from transformers import PreTrainedTokenizerBase

PROMPT, COMPLETION = "human: What is 2+2? <sep> assistant:", " <reasoning>\nTwo.\n</reasoning>\n\n4 <sep>"
# Texts that a tokenizer must give back as they are: spaces, indentation, line feeds, signs of other scripts.
CODE, SIGNS = "def f(a):\n    return a[0] <= 1", "Größe 12,5 €, 日本語 🙂"
TEXTS = (PROMPT, COMPLETION, " Yes <sep>", "  x\n\ty  z\n\n", CODE, SIGNS)


@lru_cache(maxsize=64)
def bos_ids(tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """Return the bos token that every text of the model's family begins with; none where it was trained without one."""
    first = tokenizer("a")["input_ids"][:1]
    return tuple(first) if first and first[0] == tokenizer.bos_token_id else ()


def adapt_backend(backend: dict[str, Any]) -> bool:
    """Remove the space before a text from the content of a tokenizer.json; return True if there was one."""
    changed = False
    for name in ("normalizer", "pre_tokenizer", "decoder"):
        part = backend.get(name)
        kept = []
        for step in _steps(part):
            if name == "normalizer" and step["type"] == "Prepend":
                changed = True
                continue
            if name == "decoder" and step["type"] == "Strip" and step.get("start"):
                changed = True
                continue
            if step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never":
                step["prepend_scheme"], changed = "never", True
                step.pop("add_prefix_space", None)
            if step["type"] == "ByteLevel" and step.get("add_prefix_space") and name == "pre_tokenizer":
                step["add_prefix_space"], changed = False, True
            kept.append(step)
        if part is not None:
            backend[name] = _joined(name, part, kept)
    return changed


def check_texts(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise InputError unless ids give back their text, and those of a prompt and of its completion that of both."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    for text in TEXTS:
        read = decode(encode(text))
        if read != text:
            raise InputError(
                f"the tokenizer encodes {text!r} and decodes {read!r}: it changes text, and stops and rewards would "
                "not see what the model wrote; use a model whose tokenizer keeps text"
            )
    read = decode(encode(PROMPT) + encode(COMPLETION))
    if read != PROMPT + COMPLETION:
        raise InputError(
            f"the tokenizer decodes a prompt and its completion as {read!r}: it changes text where one begins; "
            "use a model whose tokenizer keeps text"
        )


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the steps of a normalizer, pre-tokenizer or decoder."""
    if part is None:
        return []
    inner = next((part[key] for key in ("normalizers", "pretokenizers", "decoders") if key in part), None)
    return [part] if inner is None else list(inner)


def _joined(name: str, part: dict[str, Any], kept: list[dict[str, Any]]) -> dict[str, Any] | None:
    key = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}[name]
    if key in part:
        return {**part, key: kept} if kept else None
    return kept[0] if kept else None
