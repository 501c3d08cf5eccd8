"""Call the reward functions that score a whole batch, and read the values that reward functions return.

A plain function runs on the main thread, as in TRL, and cannot be interrupted there: one that hangs ends the process
and prints the stack of every thread. Coroutine functions run together, each under its time limit. A function that fails
gives errors, never values.
"""

import asyncio
import faulthandler
import inspect
import reprlib
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rekatrain.data.errors import InputError
from rekatrain.rewards.errors import RewardError, describe_error

if TYPE_CHECKING:  # compose.py imports the workers, which import this file
    from rekatrain.rewards.compose import RewardFunction

STDERR = 2
MAX_REWARD = 3.4028234663852886e38  # the largest float32


@dataclass(frozen=True, kw_only=True)
class Score:
    """The result of one reward for one completion.

    value:     the reward; None if it does not apply or has failed
    error:     one line if the grader failed; else ""
    traceback: of that failure, if there is one
    seconds:   time in the grader
    is_late:   True if the grader reached its time limit
    is_input:  True if the grader says that the recipe or the row is wrong
    """

    value: float | None = None
    error: str = ""
    traceback: str = ""
    seconds: float = 0.0
    is_late: bool = False
    is_input: bool = False


def call_batch_functions(
    functions: Sequence["RewardFunction"], arguments: Mapping[str, Any], size: int
) -> dict[str, list[Score]]:
    """Return for each function a score of each of `size` completions.

    Plain functions are called first, one by one, then all coroutine functions at once. Each has its timeout in seconds.
    Raises InputError if a function does, or if it does not return one value per completion.
    """
    scores = {function.name: _call(function, arguments, size) for function in functions if not _is_async(function)}
    waiting = [function for function in functions if _is_async(function)]
    if waiting:
        scores.update(asyncio.run(_call_together(waiting, arguments, size)))
    return scores


def _is_async(function: "RewardFunction") -> bool:
    # For an object, its method __call__ decides.
    called = function.function
    return inspect.iscoroutinefunction(called) or inspect.iscoroutinefunction(getattr(called, "__call__", None))  # noqa: B004


def _call(function: "RewardFunction", arguments: Mapping[str, Any], size: int) -> list[Score]:
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
    functions: Sequence["RewardFunction"], arguments: Mapping[str, Any], size: int
) -> dict[str, list[Score]]:
    async def call(function: "RewardFunction") -> list[Score]:
        started = time.perf_counter()
        limit = asyncio.timeout(function.timeout)
        try:
            async with limit:
                returned = await function.function(**arguments)
        except Exception as error:  # whatever a grader raises is its failure
            timed_out = RewardError(f"no result after {function.timeout:g} seconds")
            return _failures(timed_out if limit.expired() else error, size, time.perf_counter() - started)
        return _read(function.name, returned, size, time.perf_counter() - started)

    results = await asyncio.gather(*[call(function) for function in functions])
    return {function.name: scores for function, scores in zip(functions, results, strict=True)}


def _failures(error: Exception, size: int, seconds: float) -> list[Score]:
    """Return the failure of a whole batch as one error per completion; raise an InputError instead."""
    if isinstance(error, InputError):
        raise error
    text = "".join(traceback.format_exception(error))
    score = Score(error=describe_error(error), traceback=text, seconds=seconds / max(size, 1))
    return [score] * size


def _read(name: str, returned: Any, size: int, seconds: float) -> list[Score]:  # Any: whatever a function returns
    """Read the returned values; arrays and tensors of one dimension are lists too."""
    expected = f"expected a list of {size}, one finite number or None per completion"
    values = returned.tolist() if hasattr(returned, "tolist") else returned
    if not isinstance(values, Sequence) or isinstance(values, str | bytes):
        raise InputError(f"reward {name} returned {type(returned).__name__} {reprlib.repr(returned)}; {expected}")
    if len(values) != size:
        raise InputError(f"reward {name} returned {len(values)} values; {expected}")
    return [_read_value(value, seconds / size) for value in values]


def _read_value(value: Any, seconds: float) -> Score:
    try:
        if isinstance(value, Exception):
            return Score(error=describe_error(value), seconds=seconds)
        number = check_number(value)
    except Exception as error:  # not a number, or one of no finite size
        return Score(error=describe_error(error), seconds=seconds)
    return Score(value=number, seconds=seconds)


def check_number(value: Any) -> float | None:  # Any: whatever a user's function returns
    """Return a number as a float and None as it is; raise RewardError for any other value.

    numpy's and torch's scalars are numbers. A number must also be finite in float32, in which advantages are computed.
    """
    if value is None:
        return None
    number = value.item() if getattr(value, "ndim", None) == 0 else value
    if not isinstance(number, int | float) or not abs(number) <= MAX_REWARD:
        raise RewardError(f"returned {reprlib.repr(value)}; expected one finite number or None per completion")
    return float(number)
