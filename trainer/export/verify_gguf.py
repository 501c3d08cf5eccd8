"""Verify a GGUF file with llama.cpp: `python -m rekatrain.trainer.export.verify_gguf FILE REFERENCE CHECKPOINT MAX_KL`.

The tokenizer to compare with is in FILE's folder. REFERENCE is the file that `trainer.export.probe.verify_logprobs`
writes. CHECKPOINT holds distributions of the training process, from which the KL of each file is measured and limited.
MAX_KL is the limit in nats per token.
"""

import sys
from pathlib import Path
from typing import Any

import httpx2
import torch
import xllamacpp
from safetensors.torch import load_file
from torch import Tensor

from rekatrain.data.chat import STOP, encode_text, render_prompt
from rekatrain.data.families import bos_ids
from rekatrain.data.tokenizer import CL100K_GOLDEN_IDS, load_tokenizer
from rekatrain.trainer.export.probe import CONVERSATIONS
from rekatrain.trainer.models.probe import MAX_TOKENS, read_probe

TEXTS = [
    *CL100K_GOLDEN_IDS,
    *map(render_prompt, CONVERSATIONS),
    "I'll say they'RE here; don't\tyou?  x = 3.14159 ** 2  # 12 345 6789\r\n\r\n  end \n",
    "Grüße, Привет, 你好世界, नमस्ते \U0001f642\U0001f44d\U0001f3fd ½ ١٢٣٤",
]
# Nats per token that the arithmetic of training may add, by the dtype of its weights: bfloat16 rounds logits, and QLoRA
# trains on a quantized base, which its export does not have.
TRAINING_KL = {"float32": 1e-6, "bfloat16": 2e-2, "quantized": 0.5}
# Prefixes of the probe after which the log-probabilities of all next tokens are compared.
NUM_PREFIXES = 4


def main() -> None:
    """Print the verified properties, or raise AssertionError at the first that does not hold."""
    file, reference_file, checkpoint, max_kl = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), float(sys.argv[4])
    tokenizer = load_tokenizer(str(file.parent))
    reference = load_file(reference_file)
    ids = reference["ids"][0].tolist()
    server = start_server(file, n_ctx=max(len(ids), MAX_TOKENS) + 8)

    def post(path: str, **body: Any) -> Any:  # JSON
        response = httpx2.post(server.listening_address + path, json=body, timeout=600)
        return response.raise_for_status().json()

    for text in TEXTS:
        tokens = post("/tokenize", content=text, add_special=True, parse_special=False)["tokens"]
        assert tokens == encode_text(text, tokenizer), f"llama.cpp encodes {text!r} as {tokens}"
    bos = tokenizer.bos_token if bos_ids(tokenizer) else ""
    for messages in CONVERSATIONS:
        rendered = post("/apply-template", messages=messages)["prompt"]
        assert rendered == bos + render_prompt(messages), f"llama.cpp renders {rendered!r}"

    kls: list[float] = []
    for end in range(len(ids), 0, -1):
        expected = reference["logprobs"][end - 1]
        logprobs = next_logprobs(server.listening_address, ids[:end], len(expected))
        if logprobs is not None:
            kls.append(kl_divergence(expected, logprobs))
        if len(kls) == NUM_PREFIXES:
            break
    assert kls, "llama.cpp returns no probabilities after any prefix"
    kl = sum(kls) / len(kls)
    # Written so that nan, from a token that llama.cpp does not have, fails too.
    assert kl <= max_kl, (
        f"the KL from the trained model is {kl:.3g} nats per token, above {max_kl:.3g}; --max-kl sets another limit"
    )
    by = ""
    training = read_probe(checkpoint)
    if training is not None and training.nexts is not None:
        kls = []
        for expected, length in zip(*training.nexts, strict=True):
            prefix = training.ids[0][: int(length)].tolist()
            logprobs = next_logprobs(server.listening_address, prefix, len(expected))
            if logprobs is not None:
                kls.append(kl_divergence(expected, logprobs))
        kl_training = sum(kls) / max(len(kls), 1)
        limit = max_kl + TRAINING_KL[training.dtype]
        assert kl_training <= limit, (
            f"the KL from the training process is {kl_training:.3g} nats per token, above {limit:.3g}; --max-kl sets "
            "another limit"
        )
        by = f", {kl_training:.1e} from the training process (at most {limit:.1e})"
    print(
        f"{file.name} verified by llama.cpp: tokenizer, template, KL from the trained model {kl:.1e} nats per token{by}"
    )


def next_logprobs(url: str, ids: list[int], num_tokens: int, *, cache_prompt: bool = False) -> Tensor | None:
    """Return llama.cpp's log-probabilities [num_tokens], float64, of every token after `ids`; nan for missing tokens.

    Return None if its next token ends the turn or is part of a character: llama.cpp then sends no probabilities.

    cache_prompt: reuse the keys and values of the last request's prefix; the result then depends, by rounding, on the
                  requests before
    """
    options = {"n_predict": 1, "n_probs": num_tokens, "temperature": 0, "cache_prompt": cache_prompt}
    response = httpx2.post(f"{url}/completion", json={"prompt": ids, **options}, timeout=600)
    probabilities = response.raise_for_status().json().get("completion_probabilities")
    if not probabilities:
        return None
    logprobs = {candidate["id"]: candidate["logprob"] for candidate in probabilities[0]["top_logprobs"]}
    return torch.tensor([logprobs.get(token, float("nan")) for token in range(num_tokens)], dtype=torch.float64)


def kl_divergence(expected: Tensor, actual: Tensor) -> float:
    """Return KL(expected || actual) in nats, of log-probabilities [V] in float32.

    Both are normalized again in float64: over a large vocabulary llama.cpp's sum of probabilities is off by 1e-4 and
    torch's by 1e-5, several times the KL of a float32 file.
    """
    expected, actual = expected.double().log_softmax(dim=-1), actual.double().log_softmax(dim=-1)
    return (expected.exp() * (expected - actual)).sum().item()


def start_server(file: Path, *, n_ctx: int, num_slots: int = 1) -> xllamacpp.Server:
    """Start llama.cpp's server on a free local port, with the settings of serving/llama_server.sh.

    n_ctx: tokens of context per slot
    """
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.n_ctx, params.n_parallel = n_ctx * num_slots, num_slots
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    params.use_jinja, params.warmup, params.verbosity = True, False, 0
    # Otherwise the server continues an open last turn without the space between `assistant:` and its text.
    params.prefill_assistant = False
    params.antiprompt = [STOP]
    params.reasoning_format = xllamacpp.common_reasoning_format.COMMON_REASONING_FORMAT_NONE
    # Exact arithmetic, so that a small error of the weights shows. By default, keys and values are kept in float16, and
    # the less precise sums of fused attention move a log-probability by 2e-3 even with float32 weights.
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    return xllamacpp.Server(params)


if __name__ == "__main__":
    main()
