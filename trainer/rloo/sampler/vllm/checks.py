"""Check each server by a few requests, before a weight is loaded."""

import asyncio
import logging
import math
from pathlib import Path

from packaging.version import InvalidVersion, Version
from transformers import PreTrainedTokenizerBase

from rekatrain.data.chat import encode_text
from rekatrain.data.errors import InputError
from rekatrain.data.tokenizer import CL100K_GOLDEN_IDS
from rekatrain.rewards.models.endpoint import Json
from rekatrain.trainer.models.source import find_source
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.rloo.sampler.vllm.client import RequestRejected, ServerClient, ServerDown
from rekatrain.trainer.rloo.sampler.vllm.live_weights import RESUME
from rekatrain.trainer.rloo.sampler.vllm.responses import num_listed, request_filters
from rekatrain.trainer.rloo.sampler.vllm.weights import load_adapter

logger = logging.getLogger(__name__)

# The oldest version that was tested: it has token ids in responses, weight versions and runtime adapters.
OLDEST = Version("0.30.0")
START = "start it by rekatrain serve-rollouts RECIPE"


def check_servers(recipe: Recipe, config: RLOOConfig, tokenizer: PreTrainedTokenizerBase, longest_prompt: int) -> None:
    """Raise InputError unless every server serves the recipe's model with the options that rollouts need.

    longest_prompt: number of tokens of the run's longest prompt
    """
    if config.vllm_server_urls and recipe.lora is not None and config.vllm_weight_transfer == "nccl":
        raise InputError("rloo.vllm_weight_transfer nccl moves whole models; with a lora: section set it to folder")

    async def check_all() -> None:
        for url in config.vllm_server_urls:
            async with ServerClient(url, request_timeout=config.vllm_request_timeout) as client:
                try:
                    await _check(client, recipe, config, tokenizer, longest_prompt)
                except (ServerDown, RequestRejected) as error:
                    raise InputError(f"{error}; {START}") from None

    asyncio.run(check_all())


async def _check(
    client: ServerClient,
    recipe: Recipe,
    config: RLOOConfig,
    tokenizer: PreTrainedTokenizerBase,
    longest_prompt: int,
) -> None:
    name = f"the vLLM server {client.url}"
    text = str((await client.get("/version")).get("version"))
    try:
        version = Version(text)
    except InvalidVersion:
        raise InputError(f"{client.url} does not answer as vLLM does: its /version is {text}; {START}") from None
    if version < OLDEST:
        raise InputError(f"{name} is vLLM {version}: rollouts need {OLDEST} or newer")
    models = (await client.get("/v1/models")).get("data") or [{}]
    model = str(models[0].get("id"))
    wanted = find_source(recipe.model["pretrained_model_name_or_path"]).base
    if not any(_is_same(wanted, served) for served in (model, str(models[0].get("root")))):
        raise InputError(f"{name} serves {models[0].get('root')!r}, the recipe trains {wanted!r}; {START}")
    context, needed = models[0].get("max_model_len"), longest_prompt + config.max_completion_length
    if isinstance(context, int) and context < needed:
        raise InputError(
            f"{name} has a context of {context} tokens, the longest prompt and its completion need {needed}; "
            f"start it with --max-model-len {needed}"
        )
    await _check_pause(client, config, name)
    await _check_tokenizer(client, model, tokenizer, name)
    await _check_logprobs(client, model, config, tokenizer, name)
    if recipe.lora is not None:
        await _check_adapters(client, name)
    logger.info("rollouts: %s, vLLM %s, %s", client.url, version, model)


async def _check_pause(client: ServerClient, config: RLOOConfig, name: str) -> None:
    """Let a server go on that a killed run has paused; InputError if it cannot be paused and updates need that."""
    try:
        if (await client.get("/is_paused")).get("is_paused"):
            await client.post(RESUME)
            logger.warning("rollouts: %s was paused by an earlier run; it goes on", name)
    except RequestRejected:
        if config.max_staleness > 1:
            raise InputError(
                f"{name} cannot be paused, which rloo.max_staleness {config.max_staleness} needs: {START}, or with "
                "VLLM_SERVER_DEV_MODE=1"
            ) from None


async def _check_tokenizer(client: ServerClient, model: str, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    for text in CL100K_GOLDEN_IDS:  # texts that tokenizers encode differently
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        ids = (await client.post("/tokenize", body)).get("tokens")
        expected = tokenizer.encode(text, add_special_tokens=False)
        if ids != expected:
            raise InputError(
                f"{name} has another tokenizer: it encodes {text!r} as {ids}, the recipe's model as {expected}; {START}"
            )


async def _check_logprobs(
    client: ServerClient, model: str, config: RLOOConfig, tokenizer: PreTrainedTokenizerBase, name: str
) -> None:
    """Raise InputError unless the server returns log-probs of the distribution that it draws from.

    A logit bias makes one token certain. Its log-prob is then 0, but not in the raw distribution of the model.
    """
    token = encode_text("a", tokenizer)[0]
    body: Json = {"model": model, "prompt": encode_text("human:", tokenizer), "max_tokens": 1}
    body |= {"logit_bias": {str(token): 100.0}, "temperature": config.temperature, "return_token_ids": True}
    body |= request_filters(config, tokenizer)
    try:
        choice = ((await client.post("/v1/completions", body)).get("choices") or [{}])[0]
    except RequestRejected as error:
        if "logprobs" not in str(error):
            raise
        raise InputError(
            f"{error}; rloo.top_k needs that many log-probs per token: start it with --max-logprobs "
            f"{num_listed(config, tokenizer)}, as rekatrain serve-rollouts does"
        ) from None
    logprob = ((choice.get("logprobs") or {}).get("token_logprobs") or [-math.inf])[0]
    if choice.get("token_ids") != [token] or logprob < -1.0:
        raise InputError(
            f"{name} returns log-probs of the raw model, not of the distribution that it draws from: start it with "
            "--logprobs-mode processed_logprobs, as rekatrain serve-rollouts does"
        )


async def _check_adapters(client: ServerClient, name: str) -> None:
    """Raise InputError unless the server loads adapters at runtime.

    Nothing is requested that would fail in the workers of a server that does: of several workers vLLM 0.30 reads the
    first failure alone, and takes the others for answers to the next requests.
    """
    try:
        await load_adapter(client, "", None)
    except RequestRejected as error:
        if error.status == 404:
            raise InputError(
                f"{name} loads no adapters at runtime; {START}, or set VLLM_ALLOW_RUNTIME_LORA_UPDATING=True for it"
            ) from None  # any other answer comes from the route
    try:
        await client.post("/collective_rpc", {"method": "list_loras"})
    except (RequestRejected, ServerDown) as error:
        if "LoRA is not enabled" in str(error):
            raise InputError(f"{name} was started without --enable-lora; {START}") from None
        if getattr(error, "status", None) != 404:  # it has no development routes: the first step finds out
            raise


def _is_same(wanted: str, served: str) -> bool:
    return wanted == served or (Path(wanted).exists() and Path(wanted).resolve() == Path(served).resolve())
