"""Compare greedy completions of transformers, vLLM and llama.cpp, and measure the loss of each GGUF type.

    rekatrain export RUN exports/merged --dtype float32
    rekatrain export RUN exports/gguf --as gguf --quantize f32 f16 q8_0 q6_k q5_k_m q4_k_m
    bash exports/merged/serving/vllm.sh --dtype float32        # optional
    python tests/benchmarks/engines.py --model exports/merged --gguf exports/gguf/*.gguf --url http://127.0.0.1:8000

Every engine gets the prompts as ids and continues to `--length` tokens, an eos token or `<sep>`. Its completions are
compared with those of transformers in float32: the fraction of prompts with equal ids, the median position of the first
difference, and the gap at each first difference, which is the log-probability that transformers gives to its own token
minus that of the other engine's token. A gap of about 0 is a tie that rounding decides. After the first difference the
two engines read different texts, so the rest is not compared.

KL is that of the next token of a GGUF file from the next token of transformers, over the whole vocabulary, in nats. Its
mean is over evenly spread positions of the completions of transformers, with the half-width of its 95 % interval.
Positions where the file would end the turn are left out, because llama.cpp gives no probabilities there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import httpx2
import torch
from common import (
    add_model_arguments,
    load_folder_tokenizer,
    load_model,
    load_prompts,
    make_parser,
    print_table,
    write_report,
)
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rekatrain.data.stop import StopSearch
from rekatrain.trainer.export.verify_gguf import kl_divergence, next_logprobs, start_server

SECONDS = 600.0


@dataclass(frozen=True, kw_only=True)
class Completion:
    """Completion of transformers; `logprobs` [tokens, vocabulary] predict each of its tokens."""

    prompt: list[int]
    ids: list[int]
    logprobs: Tensor


@dataclass(frozen=True, kw_only=True)
class Difference:
    """First difference of an engine: the position, both tokens, and how much less likely its token is."""

    engine: str
    prompt: int
    position: int
    reference: str
    other: str
    gap: float


def finish(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, length: int) -> list[int]:
    """Cut ids at their end: the first eos token, which servers leave out, or `<sep>`, or `length`."""
    eos = tokenizer.eos_token_id
    cut = StopSearch(tokenizer).cut([*ids, eos][: [*ids, eos].index(eos) + 1])
    return cut[:length]


def complete(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int], length: int) -> Completion:
    """Return the greedy completion of transformers, and its log-probabilities from one forward pass."""
    input_ids = torch.tensor([prompt])
    with torch.no_grad():
        output = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=length,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
        ids = finish(output[0, len(prompt) :].tolist(), tokenizer, length)
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return Completion(prompt=prompt, ids=ids, logprobs=logits.float().log_softmax(dim=-1))


def complete_with_llama_cpp(url: str, prompt: list[int], length: int) -> list[int]:
    """Return the greedy ids of llama.cpp."""
    body = {"prompt": prompt, "n_predict": length, "temperature": 0, "return_tokens": True, "cache_prompt": False}
    return httpx2.post(f"{url}/completion", json=body, timeout=SECONDS).raise_for_status().json()["tokens"]


def complete_with_vllm(url: str, prompt: list[int], length: int) -> list[int]:
    """Return the greedy ids of vLLM."""
    name = httpx2.get(f"{url}/v1/models", timeout=SECONDS).raise_for_status().json()["data"][0]["id"]
    body = {"model": name, "prompt": prompt, "max_tokens": length, "temperature": 0, "return_token_ids": True}
    answer = httpx2.post(f"{url}/v1/completions", json=body, timeout=SECONDS).raise_for_status().json()
    return answer["choices"][0]["token_ids"]


def compare(
    engine: str, completions: Sequence[Completion], others: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase
) -> list[Difference]:
    """Return the first difference of each prompt that has one; `others` are finished ids."""
    found = []
    for number, (one, other) in enumerate(zip(completions, others, strict=True)):
        if one.ids == other:
            continue
        position = next(position for position, (a, b) in enumerate(zip_longest(one.ids, other)) if a != b)
        assert position < min(len(one.ids), len(other)), "one completion ends where the other continues"
        mine, its = one.ids[position], other[position]
        gap = (one.logprobs[position, mine] - one.logprobs[position, its]).item()
        texts = {"reference": tokenizer.decode([mine]), "other": tokenizer.decode([its])}
        found.append(Difference(engine=engine, prompt=number, position=position, gap=gap, **texts))
    return found


def measure_kls(url: str, completions: Sequence[Completion], count: int) -> list[float]:
    """Return the KL of the next token of a GGUF file from that of transformers, at about `count` positions."""
    positions = [(one, position) for one in completions for position in range(len(one.ids))]
    kls = []
    for one, position in positions[:: max(1, len(positions) // count)] if count else []:
        expected = one.logprobs[position]
        found = next_logprobs(url, one.prompt + one.ids[:position], len(expected), cache_prompt=True)
        if found is not None:
            kls.append(kl_divergence(expected, found))
    return kls


def summarize(engine: str, num_prompts: int, differences: Sequence[Difference], kls: Sequence[float]) -> dict[str, Any]:
    """Return the line of an engine in the table."""
    gaps = [each.gap for each in differences]
    return {
        "engine": engine,
        "prompts": num_prompts,
        "equal": (num_prompts - len(differences)) / num_prompts,
        "median first difference": median(each.position for each in differences) if differences else None,
        "median gap": median(gaps) if gaps else None,
        "largest gap": max(gaps) if gaps else None,
        "KL": fmean(kls) if kls else None,
        "+-": 1.96 * stdev(kls) / math.sqrt(len(kls)) if len(kls) > 1 else None,
        "positions": len(kls) or None,
    }


def main() -> None:
    """Print the tables and write the report."""
    parser = make_parser(__doc__, "engines.json")
    add_model_arguments(parser)
    parser.add_argument("--gguf", nargs="*", default=[], type=Path, help="GGUF files of the same model, of any types")
    parser.add_argument("--url", help="URL of a vLLM server of the same model")
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--length", type=int, default=64, help="largest number of tokens of a completion")
    parser.add_argument("--positions", type=int, default=200, help="number of positions for each KL; 0 for none")
    arguments = parser.parse_args()

    tokenizer, model = load_folder_tokenizer(arguments.model), load_model(arguments.model)
    prompts = [prompt.ids for prompt in load_prompts(tokenizer, arguments.prompts, arguments.num_prompts)]
    length = arguments.length
    completions = [complete(model, tokenizer, prompt, length) for prompt in prompts]
    rows, differences = [], []

    def add(engine: str, others: list[list[int]], kls: Sequence[float] = ()) -> None:
        found = compare(engine, completions, [finish(ids, tokenizer, length) for ids in others], tokenizer)
        rows.append(summarize(engine, len(completions), found, kls))
        differences.extend(found)
        print_table(rows[-1:])  # the files of a large model take minutes

    if arguments.url:
        add("vLLM", [complete_with_vllm(arguments.url, prompt, length) for prompt in prompts])
    for file in arguments.gguf:
        server = start_server(file, n_ctx=max(map(len, prompts)) + length + 8)
        url = server.listening_address
        kls = measure_kls(url, completions, arguments.positions)
        add(file.name, [complete_with_llama_cpp(url, prompt, length) for prompt in prompts], kls)
        del server  # which ends it
    print_table([vars(each) for each in differences], "First differences")
    print_table(
        rows, f"Greedy completions compared with transformers ({sum(len(one.ids) for one in completions)} tokens)"
    )
    write_report(arguments.out, arguments, {"engines": rows, "differences": differences})


if __name__ == "__main__":
    main()
