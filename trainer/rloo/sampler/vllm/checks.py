"""What can be wrong with a server, found by a few requests before a weight is loaded."""

import asyncio
import logging
import math
from pathlib import Path

from packaging.version import InvalidVersion, Version
from transformers import PreTrainedTokenizerBase

from rekatrain.data.chat import encode_text
from rekatrain.data.errors import InputError
from rekatrain.data.tokenizer import CL100K_GOLDEN_IDS
from rekatrain.trainer.model_source import find_source
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.rloo.sampler.vllm.client import Json, ServerClient, ServerDown, ServerRefused
from rekatrain.trainer.rloo.sampler.vllm.responses import num_listed, request_filters
from rekatrain.trainer.rloo.sampler.vllm.serve import check_adapter

logger = logging.getLogger(__name__)

# The first that has been seen to work: token ids in answers, versions of weights, adapters at runtime.
OLDEST = Version("0.30.0")
START = "start it by rekatrain serve-rollouts RECIPE"


def check_servers(recipe: Recipe, config: RLOOConfig, tokenizer: PreTrainedTokenizerBase, longest_prompt: int) -> None:
    """Raise InputError unless every server runs the recipe's model as rollouts need it.

    longest_prompt: tokens of the run's longest prompt
    """

    if config.vllm_server_urls and recipe.lora is not None:
        check_adapter(recipe.lora)
        if config.vllm_weight_transfer == "nccl":
            raise InputError("rloo.vllm_weight_transfer nccl moves whole models; with a lora: section set it to folder")

    async def check_all() -> None:
        for url in config.vllm_server_urls:
            async with ServerClient(url, request_timeout=config.vllm_request_timeout) as client:
                try:
                    await _check(client, recipe, config, tokenizer, longest_prompt)
                except (ServerDown, ServerRefused) as error:
                    raise InputError(f"{error}; {START}") from None

    asyncio.run(check_all())


async def _check(
    client: ServerClient,
    recipe: Recipe,
    config: RLOOConfig,
    tokenizer: PreTrainedTokenizerBase,
    longest_prompt: int,
) -> None:
    who = f"the vLLM server {client.url}"
    told = str((await client.get("/version")).get("version"))
    try:
        version = Version(told)
    except InvalidVersion:
        raise InputError(f"{client.url} does not answer as vLLM does: its /version is {told}; {START}") from None
    if version < OLDEST:
        raise InputError(f"{who} is vLLM {version}: rollouts need {OLDEST} or newer")
    models = (await client.get("/v1/models")).get("data") or [{}]
    model = str(models[0].get("id"))
    wanted = find_source(recipe.model["pretrained_model_name_or_path"]).base
    if not any(_is_same(wanted, served) for served in (model, str(models[0].get("root")))):
        raise InputError(f"{who} serves {models[0].get('root')!r}, the recipe trains {wanted!r}; {START}")
    context, needed = models[0].get("max_model_len"), longest_prompt + config.max_completion_length
    if isinstance(context, int) and context < needed:
        raise InputError(
            f"{who} has a context of {context} tokens, the longest prompt and its completion need {needed}; "
            f"start it with --max-model-len {needed}"
        )
    await _check_tokenizer(client, model, tokenizer, who)
    await _check_logprobs(client, model, config, tokenizer, who)
    if recipe.lora is not None:
        await _check_adapters(client, who)
    logger.info("rollouts: %s, vLLM %s, %s", client.url, version, model)


async def _check_tokenizer(client: ServerClient, model: str, tokenizer: PreTrainedTokenizerBase, who: str) -> None:
    for text in CL100K_GOLDEN_IDS:  # texts that tokenizers differ on
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        ids, ours = (
            (await client.post("/tokenize", body)).get("tokens"),
            tokenizer.encode(text, add_special_tokens=False),
        )
        if ids != ours:
            raise InputError(f"{who} has another tokenizer: it encodes {text!r} as {ids}, the recipe's model as {ours}")


async def _check_logprobs(
    client: ServerClient, model: str, config: RLOOConfig, tokenizer: PreTrainedTokenizerBase, who: str
) -> None:
    """A token that a bias makes certain has log-probability 0 where the server tells what it draws from."""
    token = encode_text("a", tokenizer)[0]
    body: Json = {"model": model, "prompt": encode_text("human:", tokenizer), "max_tokens": 1}
    body |= {"logit_bias": {str(token): 100.0}, "temperature": config.temperature, "return_token_ids": True}
    body |= request_filters(config, tokenizer)
    try:
        choice = ((await client.post("/v1/completions", body)).get("choices") or [{}])[0]
    except ServerRefused as error:
        if "logprobs" not in str(error):
            raise
        raise InputError(
            f"{error}; rloo.top_k asks for as many log-probabilities a token: start it with --max-logprobs "
            f"{num_listed(config, tokenizer)}, as rekatrain serve-rollouts does"
        ) from None
    logprob = ((choice.get("logprobs") or {}).get("token_logprobs") or [-math.inf])[0]
    if choice.get("token_ids") != [token] or logprob < -1.0:
        raise InputError(
            f"{who} gives logprobs of the raw model, not of what it draws from: start it with "
            "--logprobs-mode processed_logprobs, as rekatrain serve-rollouts does"
        )


async def _check_adapters(client: ServerClient, who: str) -> None:
    """A server that can load adapters looks for the one that is not there."""
    try:
        await client.post("/v1/load_lora_adapter", {"lora_name": "rekatrain-none", "lora_path": "/nonexistent"})
    except ServerRefused as error:
        if "No adapter found" in str(error):
            return
        if "LoRA is not enabled" in str(error):
            raise InputError(f"{who} was started without --enable-lora; {START}") from None
        if error.status != 404:
            raise
    raise InputError(
        f"{who} loads no adapters at runtime; {START}, or set VLLM_ALLOW_RUNTIME_LORA_UPDATING=True for it"
    )


def _is_same(wanted: str, served: str) -> bool:
    return wanted == served or (Path(wanted).exists() and Path(wanted).resolve() == Path(served).resolve())
