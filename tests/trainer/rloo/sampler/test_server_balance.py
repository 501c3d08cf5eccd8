"""Groups are spread over servers, by processes that do not see each other's groups."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from rekatrain.rewards.models.endpoint import Json
from rekatrain.trainer.rloo.config import RLOOConfig
from rekatrain.trainer.rloo.sampler.vllm.client import ServerClient
from rekatrain.trainer.rloo.sampler.vllm.sampler import VLLMSampler
from rekatrain.trainer.rloo.sampler.vllm.server_pool import Paces
from tests.helpers.json_servers import JsonServer


class AnyWeights:
    """Weights that every server has."""

    name, model = "any", None

    async def load(self, client: ServerClient) -> None:
        """Load nothing."""

    async def check(self, client: ServerClient, response: Json) -> None:
        """Accept every response."""


@pytest.fixture
def start_servers(serve, tokenizer: PreTrainedTokenizerFast) -> Callable[[list[float]], list[JsonServer]]:
    """Start counting servers that answer each group after so many seconds."""

    def start(seconds: list[float]) -> list[JsonServer]:
        def answer_after(delay: float) -> Callable[[str, Any], tuple[int, Any]]:
            def answer(path: str, body: Any) -> tuple[int, Any]:
                if body is None:
                    return 200, {}
                time.sleep(delay)
                ids = [5] * 3 + [tokenizer.eos_token_id]
                choice = {"token_ids": ids, "logprobs": {"token_logprobs": [-1.0] * len(ids)}}
                return 200, {"choices": [{"index": index, **choice} for index in range(body["n"])]}

            return answer

        return [serve(answer_after(delay)) for delay in seconds]

    return start


def roll_out(
    servers: list[JsonServer],
    tokenizer: PreTrainedTokenizerFast,
    *,
    ranks: int,
    groups: int,
    at_once: int,
    batches: int,
) -> list[Counter[int]]:
    """Sample batches of groups by several ranks at the same time -> for each batch, the groups of each server."""
    config = RLOOConfig(
        max_steps=1,
        num_generations=2,
        per_device_generation_batch_size=2 * at_once,
        vllm_server_base_url=[server.url for server in servers],
    )
    samplers = [VLLMSampler(tokenizer, config, vocab_size=len(tokenizer), rank=rank) for rank in range(ranks)]
    together = threading.Barrier(ranks)
    counts = []

    def sample(sampler: VLLMSampler) -> None:
        sampler.served.weights = AnyWeights()
        together.wait()
        sampler.sample([[5]] * groups, [(1, 0, 0, index) for index in range(groups)], 2)

    with ThreadPoolExecutor(ranks) as threads:
        for _ in range(batches):
            before = [server.paths.count("/v1/completions") for server in servers]
            list(threads.map(sample, samplers))
            after = [server.paths.count("/v1/completions") for server in servers]
            counts.append(Counter({index: after[index] - before[index] for index in range(len(servers))}))
    assert all(sum(of_batch.values()) == ranks * groups for of_batch in counts)
    return counts


@pytest.mark.parametrize(
    ("num_servers", "ranks", "groups", "at_once"),
    [(8, 8, 2, 8), (8, 4, 1, 8), (20, 12, 6, 16), (48, 16, 4, 32), (3, 2, 4, 2), (4, 4, 16, 8), (5, 1, 3, 1)],
)
def test_groups_of_all_ranks_use_all_servers_evenly(
    start_servers, tokenizer, num_servers: int, ranks: int, groups: int, at_once: int
) -> None:
    # Later groups go by the measured paces: the load of this machine must be small beside them.
    servers = start_servers([0.05 if at_once >= groups else 0.5] * num_servers)
    (counts,) = roll_out(servers, tokenizer, ranks=ranks, groups=groups, at_once=at_once, batches=1)
    even = ranks * groups / num_servers
    # Where all are sent at once, no server has more than another, but for the remainder.
    tolerance = 1 if at_once >= groups else 2
    assert max(counts.values()) - min(counts.values()) <= tolerance
    assert max(counts.values()) < even + tolerance
    assert sum(count > 0 for count in counts.values()) == min(num_servers, ranks * groups)


def test_a_slow_server_gets_fewer_groups(start_servers, tokenizer) -> None:
    servers = start_servers([0.02, 0.02, 0.02, 0.3])
    first, *later = roll_out(servers, tokenizer, ranks=2, groups=12, at_once=4, batches=3)
    # Within a batch it gets its next group only when it has answered; later batches know its pace beforehand.
    assert first[3] < min(first[index] for index in range(3))
    for counts in later:
        assert counts[3] < min(counts[index] for index in range(3))


def test_a_server_that_became_fast_is_used_again() -> None:
    paces = Paces()
    for url, seconds in (("a", 1.0), ("b", 1.9), ("c", 9.0)):
        paces.measure(url, seconds, 1)
    assert [paces.factor(url) for url in "abcd"] == [1, 1, 8, 1]  # d is not measured yet
    for _ in range(8):  # batches in which c gets nothing
        paces.begin_batch()
        paces.measure("a", 1.0, 1)
        paces.measure("b", 1.9, 1)
    assert paces.factor("c") == 1
    paces.measure("c", 9.0, 1)
    assert paces.factor("c") == 4
