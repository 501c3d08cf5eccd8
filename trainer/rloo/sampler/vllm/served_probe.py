"""Find a server with other weights than the trainer's in the step, not in the reward curve.

A server that has just loaded weights answers with the log-probabilities of a few texts. They must be those that the
training processes computed with the weights that they published.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from rekatrain.data.errors import InputError
from rekatrain.rewards.models.endpoint import Json
from rekatrain.trainer.models.probe import TrainingProbe, find_difference
from rekatrain.trainer.rloo.sampler.vllm.client import ServerClient

# Likeliest tokens after a prefix that a server lists; vLLM lists at most 20 by default.
NUM_LISTED = 5


async def check_served(client: ServerClient, probe: TrainingProbe, *, model: str | None) -> None:
    """Raise InputError if the server's weights are not those of the probe. No other request may be in flight.

    model: name in requests; None: the server's default model
    """
    logprobs = []
    for ids_L in probe.ids:
        ids = ids_L.tolist()
        body: Json = {"prompt": ids, "max_tokens": 1, "prompt_logprobs": 0, **_name(model)}
        logprobs.append(_read(await client.post("/v1/completions", body), ids, client.url))
    _compare(client, replace(probe, nexts=None), logprobs)


async def check_busy(client: ServerClient, probe: TrainingProbe, *, model: str | None) -> None:
    """Raise InputError as `check_served` does, by the likeliest tokens after the prefixes of the probe's first text.

    Other requests may be in flight. With an adapter, vLLM 0.30 computes the log-probabilities of a prompt with the
    indices of the rows that are decoded in the same pass, and its CPU build ends where their numbers differ.
    """
    assert probe.nexts is not None
    ids, expected, listed = probe.ids[0].tolist(), list[float](), list[float]()
    for next_V, length in zip(*probe.nexts, strict=True):
        settings = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_tokens": 1, "return_tokens_as_token_ids": True}
        body: Json = {"prompt": ids[: int(length)], "logprobs": NUM_LISTED, **settings, **_name(model)}
        likeliest = _read_likeliest(await client.post("/v1/completions", body), client.url)
        expected += [float(next_V[token]) for token in likeliest]
        listed += likeliest.values()
    _compare(client, replace(probe, logprobs=[torch.tensor(expected)], nexts=None), [torch.tensor(listed)])


def _name(model: str | None) -> Json:
    return {"model": model} if model else {}


def _compare(client: ServerClient, probe: TrainingProbe, logprobs: list[Tensor]) -> None:
    # The server computes in the dtype of the trainer, by rekatrain serve-rollouts.
    difference = find_difference(probe, replace(probe, logprobs=logprobs))
    if difference:
        raise InputError(
            f"the vLLM server {client.url} does not hold the weights that were published to it: {difference}. Start it "
            "by rekatrain serve-rollouts with this recipe, and continue the run with --resume"
        )


def _read_likeliest(response: Json, url: str) -> Mapping[int, float]:
    """Return the log-probabilities of the likeliest tokens of a completion's first position, by token."""
    try:
        listed = response["choices"][0]["logprobs"]["top_logprobs"][0]
        return {int(name.removeprefix("token_id:")): float(value) for name, value in listed.items()}
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise InputError(f"the vLLM server {url} lists no likeliest tokens: {error!r}") from error


def _read(response: Json, ids: list[int], url: str) -> Tensor:
    """Return the log-probabilities of a prompt's tokens after the first, [L - 1]."""
    choice = (response.get("choices") or [{}])[0]
    try:
        values = [
            float(entry[str(token)]["logprob"])
            for entry, token in zip(choice["prompt_logprobs"][1:], ids[1:], strict=True)
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"the vLLM server {url} returns no prompt_logprobs of a text: {error!r}") from error
    return torch.tensor(values)
