"""Call the reward functions of a batch that are coroutine functions: together, each under its time limit."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rekatrain.rewards.calls import FAILURES, BatchCaller, failures, shielded
from rekatrain.rewards.errors import RewardError
from rekatrain.rewards.outcome import Outcome


def call_together(callers: Sequence[BatchCaller], arguments: Mapping[str, Any], size: int) -> dict[str, list[Outcome]]:
    """Return for each function an outcome of each of `size` completions; raise what `call_batch_functions` does."""
    with shielded():
        return asyncio.run(_gather(callers, arguments, size))


async def _gather(callers: Sequence[BatchCaller], arguments: Mapping[str, Any], size: int) -> dict[str, list[Outcome]]:
    results = await asyncio.gather(*[_call(caller, arguments, size) for caller in callers])
    return {caller.reward.name: outcomes for caller, outcomes in zip(callers, results, strict=True)}


async def _call(caller: BatchCaller, arguments: Mapping[str, Any], size: int) -> list[Outcome]:
    started = time.perf_counter()
    limit = asyncio.timeout(caller.timeout)
    try:
        async with limit:
            returned, reports = await caller.call_in_its_form(arguments)
    except FAILURES as error:
        timed_out = RewardError(f"no result after {caller.timeout:g} seconds")
        return failures(timed_out if limit.expired() else error, size, time.perf_counter() - started)
    return caller.read(returned, reports, size, time.perf_counter() - started)
