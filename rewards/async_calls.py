"""Call the reward functions of a batch that are coroutine functions: together, each under its time limit."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rekatrain.rewards.calls import BatchCaller, failures
from rekatrain.rewards.errors import RewardError
from rekatrain.rewards.outcome import Outcome
from rekatrain.rewards.process_state import kept_state
from rekatrain.rewards.shield import shielded

_perf_counter = time.perf_counter  # a reward may replace it in its module


def call_together(callers: Sequence[BatchCaller], arguments: Mapping[str, Any], size: int) -> dict[str, list[Outcome]]:
    """Return for each function an outcome of each of `size` completions; raise what `call_batch_functions` does."""
    with kept_state() as interrupts, shielded():
        return asyncio.run(_gather(callers, arguments, size, interrupts))


async def _gather(
    callers: Sequence[BatchCaller], arguments: Mapping[str, Any], size: int, interrupts: Sequence[BaseException]
) -> dict[str, list[Outcome]]:
    results = await asyncio.gather(*[_call(caller, arguments, size, interrupts) for caller in callers])
    return {caller.reward.name: outcomes for caller, outcomes in zip(callers, results, strict=True)}


async def _call(
    caller: BatchCaller, arguments: Mapping[str, Any], size: int, interrupts: Sequence[BaseException]
) -> list[Outcome]:
    started = _perf_counter()
    limit = asyncio.timeout(caller.timeout)
    try:
        async with limit:
            returned, reports = await caller.call_in_its_form(arguments)
        return caller.read(returned, reports, size, _perf_counter() - started)
    except BaseException as error:
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
            raise  # an interruption ends all calls
        timed_out = RewardError(f"no result after {caller.timeout:g} seconds")
        return failures(timed_out if limit.expired() else error, size, _perf_counter() - started, interrupts)
