"""A byte-level BPE tokenizer as GGUF fields, and llama.cpp's name for its pre-tokenizer.

A GGUF file holds no regex. It names one of the pre-tokenizers compiled into llama.cpp, and a wrong name gives wrong ids
without an error. So the name is derived from the tokenizer's own settings, and verify_gguf.py compares ids.
"""

import json
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from rekatrain.data.errors import InputError
from rekatrain.data.tokenizer import is_cl100k


def find_pre_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return llama.cpp's name of the pre-tokenizer; raise InputError if it is none of the three known here."""
    state = _state(tokenizer)
    if state["model"]["type"] != "BPE" or state["normalizer"] is not None:
        raise InputError(
            f"--as gguf: the tokenizer is {state['model']['type']} with normalizer "
            f"{state['normalizer'] and state['normalizer']['type']}; only plain byte-level BPE can be converted"
        )
    if is_cl100k(tokenizer):  # its golden ids were checked when it was loaded
        return "dbrx"  # llama.cpp has no name cl100k_base; DBRX was the first model with its regex
    parts = state["pre_tokenizer"]
    parts = parts["pretokenizers"] if parts["type"] == "Sequence" else [parts]
    last = parts[-1]
    if last["type"] == "ByteLevel" and last["use_regex"] and not last["add_prefix_space"]:
        if len(parts) == 1:
            return "gpt-2"
        if [(part["type"], part.get("individual_digits")) for part in parts[:-1]] == [("Digits", True)]:
            return "smollm"
    raise InputError(
        f"--as gguf: llama.cpp's name for the pre-tokenizer {json.dumps(state['pre_tokenizer'])} is unknown; "
        "supported are those of cl100k_base (dbrx), GPT-2 and SmolLM"
    )


def add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Write vocabulary, merges, special ids and chat template.

    vocab_size: the model's; ids beyond the tokenizer's become unused tokens
    """
    state = _state(tokenizer)
    added = {token["id"]: token for token in state["added_tokens"]}
    by_id = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    tokens, types = [], []
    for token_id in range(vocab_size):
        tokens.append(by_id.get(token_id, f"[PAD{token_id}]"))
        if token_id not in by_id:
            types.append(TokenType.UNUSED)
        elif token_id in added:
            types.append(TokenType.CONTROL if added[token_id]["special"] else TokenType.USER_DEFINED)
        else:
            types.append(TokenType.NORMAL)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]]

    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(find_pre_tokenizer(tokenizer))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(False)  # the format begins with text
    writer.add_add_space_prefix(False)
    assert isinstance(tokenizer.chat_template, str)
    writer.add_chat_template(tokenizer.chat_template)


def _state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the content of tokenizer.json. Any: the tokenizers library defines its schema."""
    return json.loads(tokenizer.backend_tokenizer.to_str())
