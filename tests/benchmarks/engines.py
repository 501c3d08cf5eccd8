"""Do transformers, vLLM and llama.cpp say the same greedily, and what does each GGUF type lose?

    rekatrain export RUN exports/merged --dtype float32
    rekatrain export RUN exports/gguf --as gguf --quantize f32 f16 q8_0 q6_k q5_k_m q4_k_m
    bash exports/merged/serving/vllm.sh --dtype float32        # optional
    python tests/benchmarks/engines.py --model exports/merged --gguf exports/gguf/*.gguf --url http://127.0.0.1:8000

Every engine gets the prompts as ids and goes on to `--length` tokens, an eos token or `<sep>`. What it says is held
against transformers in float32: the share of prompts with equal ids, the median place of the first difference, and at
each first difference how much less log-probability transformers gives to the other engine's token than to its own. A
gap of about 0 is a tie that rounding decides; from there on the two read different texts, so what follows says nothing.

KL is that of a GGUF file's next token from transformers', over the whole vocabulary, in nats: its mean over places of
transformers' completions, evenly spread, with the half-width of its 95 % interval. A place where the file would end the
turn is left out: llama.cpp gives no probabilities there.
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
from rekatrain.data.stop import StopSearch
from rekatrain.trainer.export.verify_gguf import kl_divergence, next_logprobs, start_server
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

SECONDS = 600.0


@dataclass(frozen=True, kw_only=True)
class Said:
    """What transformers says to a prompt; `logprobs` [tokens, vocabulary] are those before each of its tokens."""

    prompt: list[int]
    ids: list[int]
    logprobs: Tensor


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Where an engine first says something else: the place, both tokens, and how much less likely its own is."""

    engine: str
    prompt: int
    place: int
    reference: str
    other: str
    gap: float


def finish(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, length: int) -> list[int]:
    """Ids with their end: the first eos token, which servers leave out, or `<sep>`, or `length`."""
    eos = tokenizer.eos_token_id
    cut = StopSearch(tokenizer).cut([*ids, eos][: [*ids, eos].index(eos) + 1])
    return cut[:length]


def say(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: list[int], length: int) -> Said:
    """Transformers' greedy completion, and its log-probabilities in one forward pass."""
    given = torch.tensor([prompt])
    with torch.no_grad():
        output = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=length,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
        ids = finish(output[0, len(prompt) :].tolist(), tokenizer, length)
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return Said(prompt=prompt, ids=ids, logprobs=logits.float().log_softmax(dim=-1))


def ask_llama_cpp(url: str, prompt: list[int], length: int) -> list[int]:
    """llama.cpp's greedy ids."""
    body = {"prompt": prompt, "n_predict": length, "temperature": 0, "return_tokens": True, "cache_prompt": False}
    return httpx2.post(f"{url}/completion", json=body, timeout=SECONDS).raise_for_status().json()["tokens"]


def ask_vllm(url: str, prompt: list[int], length: int) -> list[int]:
    """vLLM's greedy ids."""
    name = httpx2.get(f"{url}/v1/models", timeout=SECONDS).raise_for_status().json()["data"][0]["id"]
    body = {"model": name, "prompt": prompt, "max_tokens": length, "temperature": 0, "return_token_ids": True}
    answer = httpx2.post(f"{url}/v1/completions", json=body, timeout=SECONDS).raise_for_status().json()
    return answer["choices"][0]["token_ids"]


def compare(
    engine: str, said: Sequence[Said], others: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase
) -> list[Difference]:
    """The first difference of each prompt that has one; `others` are finished ids."""
    found = []
    for number, (one, other) in enumerate(zip(said, others, strict=True)):
        if one.ids == other:
            continue
        place = next(place for place, (a, b) in enumerate(zip_longest(one.ids, other)) if a != b)
        assert place < min(len(one.ids), len(other)), "a completion does not end where the other goes on"
        mine, its = one.ids[place], other[place]
        gap = (one.logprobs[place, mine] - one.logprobs[place, its]).item()
        texts = {"reference": tokenizer.decode([mine]), "other": tokenizer.decode([its])}
        found.append(Difference(engine=engine, prompt=number, place=place, gap=gap, **texts))
    return found


def measure_kls(url: str, said: Sequence[Said], count: int) -> list[float]:
    """The KL of a GGUF file's next token from transformers', at about `count` places."""
    places = [(one, place) for one in said for place in range(len(one.ids))]
    kls = []
    for one, place in places[:: max(1, len(places) // count)] if count else []:
        expected = one.logprobs[place]
        found = next_logprobs(url, one.prompt + one.ids[:place], len(expected), cache_prompt=True)
        if found is not None:
            kls.append(kl_divergence(expected, found))
    return kls


def summarise(engine: str, num_prompts: int, differences: Sequence[Difference], kls: Sequence[float]) -> dict[str, Any]:
    """An engine's line of the table."""
    gaps = [each.gap for each in differences]
    return {
        "engine": engine,
        "prompts": num_prompts,
        "equal": (num_prompts - len(differences)) / num_prompts,
        "median first difference": median(each.place for each in differences) if differences else None,
        "median gap": median(gaps) if gaps else None,
        "largest gap": max(gaps) if gaps else None,
        "KL": fmean(kls) if kls else None,
        "+-": 1.96 * stdev(kls) / math.sqrt(len(kls)) if len(kls) > 1 else None,
        "places": len(kls) or None,
    }


def main() -> None:
    """Print the tables and write the report."""
    parser = make_parser(__doc__, "engines.json")
    add_model_arguments(parser)
    parser.add_argument("--gguf", nargs="*", default=[], type=Path, help="files of the same model, of any types")
    parser.add_argument("--url", help="a vLLM server of the same model")
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--length", type=int, default=64, help="tokens of a completion, at most")
    parser.add_argument("--places", type=int, default=200, help="about so many for each KL; 0 for none")
    arguments = parser.parse_args()

    tokenizer, model = load_folder_tokenizer(arguments.model), load_model(arguments.model)
    prompts = [prompt.ids for prompt in load_prompts(tokenizer, arguments.prompts, arguments.num_prompts)]
    length = arguments.length
    said = [say(model, tokenizer, prompt, length) for prompt in prompts]
    rows, differences = [], []

    def add(engine: str, others: list[list[int]], kls: Sequence[float] = ()) -> None:
        found = compare(engine, said, [finish(ids, tokenizer, length) for ids in others], tokenizer)
        rows.append(summarise(engine, len(said), found, kls))
        differences.extend(found)
        print_table(rows[-1:])  # a large model's files take their time

    if arguments.url:
        add("vLLM", [ask_vllm(arguments.url, prompt, length) for prompt in prompts])
    for file in arguments.gguf:
        server = start_server(file, n_ctx=max(map(len, prompts)) + length + 8)
        url = server.listening_address
        kls = measure_kls(url, said, arguments.places)
        add(file.name, [ask_llama_cpp(url, prompt, length) for prompt in prompts], kls)
        del server  # which ends it
    print_table([vars(each) for each in differences], "First differences")
    print_table(rows, f"Greedy completions beside transformers' ({sum(len(one.ids) for one in said)} tokens)")
    write_report(arguments.out, arguments, {"engines": rows, "differences": differences})


if __name__ == "__main__":
    main()
