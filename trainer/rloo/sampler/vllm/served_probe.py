"""Find a server with other weights than the trainer's in the step, not in the reward curve.

A server that has just loaded weights answers with the log-probabilities of a few texts. They must be those that the
training processes computed with the weights that they published.
"""

import torch
from torch import Tensor

from rekatrain.data.errors import InputError
from rekatrain.rewards.models.endpoint import Json
from rekatrain.trainer.models.probe import TrainingProbe, find_difference
from rekatrain.trainer.rloo.sampler.vllm.client import ServerClient


async def check_served(client: ServerClient, probe: TrainingProbe, *, model: str | None) -> None:
    """Raise InputError if the server's weights are not those of the probe.

    model: name in requests; None: the server's default model
    """
    logprobs = []
    for ids_L in probe.ids:
        ids = ids_L.tolist()
        body: Json = {"prompt": ids, "max_tokens": 1, "prompt_logprobs": 0, **({"model": model} if model else {})}
        logprobs.append(_read(await client.post("/v1/completions", body), ids, client.url))
    # The server computes in the dtype of the trainer, by rekatrain serve-rollouts.
    difference = find_difference(probe, TrainingProbe(ids=probe.ids, logprobs=logprobs, dtype=probe.dtype))
    if difference:
        raise InputError(
            f"the vLLM server {client.url} does not hold the weights that were published to it: {difference}. Start it "
            "by rekatrain serve-rollouts with this recipe, and continue the run with --resume"
        )


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
