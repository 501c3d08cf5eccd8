"""Check a GGUF file with llama.cpp in a fresh process: `python -m rekatrain.export.verify_gguf FILE REFERENCE`.

The tokenizer that it must equal lies in FILE's folder; REFERENCE is what trainer/export/probe.py writes.
"""

import sys
from pathlib import Path
from typing import Any

import httpx2
import torch
import xllamacpp
from rekatrain.data.chat import STOP, encode_text, render_prompt
from rekatrain.data.tokenizer import CL100K_GOLDEN_IDS, load_tokenizer
from rekatrain.trainer.export.probe import CONVERSATIONS
from safetensors.torch import load_file
from torch import Tensor

TEXTS = [
    *CL100K_GOLDEN_IDS,
    *map(render_prompt, CONVERSATIONS),
    "I'll say they'RE here; don't\tyou?  x = 3.14159 ** 2  # 12 345 6789\r\n\r\n  end \n",
    "Grüße, Привет, 你好世界, नमस्ते \U0001f642\U0001f44d\U0001f3fd ½ ١٢٣٤",
]
# Prefixes of the probe after which the next token's log-probabilities are compared, over the whole vocabulary.
NUM_PLACES = 4
# A KL in nats a token. That of the exact types is rounding; for the others the limit is several times what SmolLM2-135M
# loses (q8_0 6e-3, q5_k_m 0.1), a small and so a fragile model: it tells a broken file from a coarse one. That q5_k_m
# loses more there than q4_k_m is the model's doing: its weights come from a Q4_1 file and lie on 16 levels a block.
MAX_KL = {"f32": 1e-8, "bf16": 1e-3, "f16": 1e-3, "q8_0": 3e-2, "q6_k": 0.1, "q5_k_m": 0.5, "q4_k_m": 0.5}


def main() -> None:
    """Print what was verified; an AssertionError says what was not."""
    file, reference_file = Path(sys.argv[1]), sys.argv[2]
    tokenizer = load_tokenizer(str(file.parent))
    reference = load_file(reference_file)
    ids = reference["ids"][0].tolist()
    server = start_server(file, n_ctx=len(ids) + 8)

    def ask(path: str, **body: Any) -> Any:  # JSON
        response = httpx2.post(server.listening_address + path, json=body, timeout=600)
        return response.raise_for_status().json()

    for text in TEXTS:
        found = ask("/tokenize", content=text, add_special=True, parse_special=False)["tokens"]
        assert found == encode_text(text, tokenizer), f"llama.cpp encodes {text!r} as {found}"
    for messages in CONVERSATIONS:
        rendered = ask("/apply-template", messages=messages)["prompt"]
        assert rendered == render_prompt(messages), f"llama.cpp renders {rendered!r}"

    kls: list[float] = []
    for end in range(len(ids), 0, -1):
        expected = reference["logprobs"][end - 1]
        found = next_logprobs(server.listening_address, ids[:end], len(expected))
        if found is not None:
            kls.append(kl_divergence(expected, found))
        if len(kls) == NUM_PLACES:
            break
    assert kls, "llama.cpp gives no probabilities at any place"
    kl = sum(kls) / len(kls)
    # Not `kl > limit`: nan, a token that llama.cpp does not have, is no pass.
    assert kl <= MAX_KL[file.stem.removeprefix("model-")], f"KL from the trained model is {kl} nats a token"
    print(f"{file.name} verified by llama.cpp: tokenizer, template, KL from the trained model {kl:.1e} nats a token")


def next_logprobs(url: str, ids: list[int], num_tokens: int, *, cache_prompt: bool = False) -> Tensor | None:
    """llama.cpp's log-probabilities [num_tokens], float64, of every token after `ids`; nan for one it does not have.

    None where its next token ends the turn, or is a part of a character: it then answers without probabilities.

    cache_prompt: compute only what is new since the last call; sums then depend, by rounding, on what was asked before
    """
    asked = {"n_predict": 1, "n_probs": num_tokens, "temperature": 0, "cache_prompt": cache_prompt}
    response = httpx2.post(f"{url}/completion", json={"prompt": ids, **asked}, timeout=600)
    told = response.raise_for_status().json().get("completion_probabilities")
    if not told:
        return None
    logprobs = {candidate["id"]: candidate["logprob"] for candidate in told[0]["top_logprobs"]}
    return torch.tensor([logprobs.get(token, float("nan")) for token in range(num_tokens)], dtype=torch.float64)


def kl_divergence(expected: Tensor, found: Tensor) -> float:
    """KL(expected || found) in nats, of log-probabilities [V] that are normalized to no more than float32's precision.

    Over a large vocabulary llama.cpp's sum of probabilities is off by 1e-4 and torch's by 1e-5, several times the KL of
    a file in float32: both are normalized again.
    """
    expected, found = expected.double().log_softmax(dim=-1), found.double().log_softmax(dim=-1)
    return (expected.exp() * (expected - found)).sum().item()


def start_server(file: Path, *, n_ctx: int, num_slots: int = 1) -> xllamacpp.Server:
    """llama.cpp's server on a free port of this machine, with serving/llama_server.sh's settings."""
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.n_ctx, params.n_parallel = n_ctx * num_slots, num_slots
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
    params.use_jinja, params.warmup, params.verbosity = True, False, 0
    # Otherwise the server itself continues an open last turn, without the space between `assistant:` and its text.
    params.prefill_assistant = False
    params.antiprompt = [STOP]
    params.reasoning_format = xllamacpp.common_reasoning_format.COMMON_REASONING_FORMAT_NONE
    # Exact arithmetic, so that a small error of the weights shows: unless told otherwise keys and values are kept in
    # float16, and the fused attention, whose sums are coarser, moves a log-probability by 2e-3 with float32 weights.
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    return xllamacpp.Server(params)


if __name__ == "__main__":
    main()
