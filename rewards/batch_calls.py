"""Calls reward functions that score a whole batch, and reads what they return: their failures are errors, never values.

A plain function runs where TRL runs it, on the main thread, and cannot be interrupted there: one that hangs ends the
process, with the stack that shows where. Coroutine functions run together, each under its time limit.
"""

import asyncio
import faulthandler
import inspect
import reprlib
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from rekatrain.data.errors import InputError
from rekatrain.rewards.compose import RewardFunction
from rekatrain.rewards.errors import RewardError
from rekatrain.rewards.workers.process import Score, check_number

STDERR = 2


def call_batch_functions(
    functions: Sequence[RewardFunction], arguments: Mapping[str, Any], size: int
) -> dict[str, list[Score]]:
    """A score for each of `size` completions by each function: first the plain ones, one by one, then all coroutines.

    Each function has its timeout in seconds. Raises InputError for what the user can mend.
    """
    scores = {function.name: _call(function, arguments, size) for function in functions if not _is_async(function)}
    waiting = [function for function in functions if _is_async(function)]
    if waiting:
        scores.update(asyncio.run(_call_together(waiting, arguments, size)))
    return scores


def _is_async(function: RewardFunction) -> bool:
    # Of an object, what counts is its method __call__.
    called = function.function
    return inspect.iscoroutinefunction(called) or inspect.iscoroutinefunction(getattr(called, "__call__", None))  # noqa: B004


def _call(function: RewardFunction, arguments: Mapping[str, Any], size: int) -> list[Score]:
    assert function.timeout is not None
    started = time.perf_counter()
    faulthandler.dump_traceback_later(function.timeout, exit=True, file=STDERR)
    try:
        returned = function.function(**arguments)
    except Exception as error:  # whatever a grader raises is its failure
        return _failures(error, size, time.perf_counter() - started)
    finally:
        faulthandler.cancel_dump_traceback_later()
    return _read(function.name, returned, size, time.perf_counter() - started)


async def _call_together(
    functions: Sequence[RewardFunction], arguments: Mapping[str, Any], size: int
) -> dict[str, list[Score]]:
    async def call(function: RewardFunction) -> list[Score]:
        started = time.perf_counter()
        limit = asyncio.timeout(function.timeout)
        try:
            async with limit:
                returned = await function.function(**arguments)
        except Exception as error:  # whatever a grader raises is its failure
            late = RewardError(f"no result after {function.timeout:g} seconds")
            return _failures(late if limit.expired() else error, size, time.perf_counter() - started)
        return _read(function.name, returned, size, time.perf_counter() - started)

    results = await asyncio.gather(*[call(function) for function in functions])
    return {function.name: scores for function, scores in zip(functions, results, strict=True)}


def _failures(error: Exception, size: int, seconds: float) -> list[Score]:
    """The failure of a whole batch; what the user can mend is raised instead."""
    if isinstance(error, InputError):
        raise error
    told = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    text = "".join(traceback.format_exception(error))
    return [Score(error=told, traceback=text, seconds=seconds / max(size, 1)) for _ in range(size)]


def _read(name: str, returned: Any, size: int, seconds: float) -> list[Score]:  # Any: whatever a function returns
    """What a batch function returned; arrays and tensors of one dimension are lists too."""
    expected = f"expected a list of {size}, one finite number or None a completion"
    values = returned.tolist() if hasattr(returned, "tolist") else returned
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise InputError(f"reward {name} returned {type(returned).__name__} {reprlib.repr(returned)}; {expected}")
    if len(values) != size:
        raise InputError(f"reward {name} returned {len(values)} values; {expected}")
    return [_read_value(value, seconds / size) for value in values]


def _read_value(value: Any, seconds: float) -> Score:
    try:
        if isinstance(value, Exception):
            raise value
        number = check_number(value)
    except Exception as error:  # an error in the place of a value, or no value
        return Score(error=f"{type(error).__name__}: {error}", traceback=str(error), seconds=seconds)
    return Score(value=number, seconds=seconds)
