"""Call the reward functions that score a whole batch.

A plain function runs on the main thread, as in TRL, and cannot be interrupted there: one that hangs ends the process
and prints the stack of every thread. Coroutine functions run together, each under its time limit. A function that fails
gives errors, never values. What it changes is its own: it gets copies, and cannot end or move the process (shield.py).
"""

import asyncio
import faulthandler
import inspect
import logging
import reprlib
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rekatrain.data.errors import InputError, TrainingStopped
from rekatrain.rewards.errors import RewardError, describe_error
from rekatrain.rewards.outcome import Outcome, read_value
from rekatrain.rewards.progress import Progress
from rekatrain.rewards.registry import REWARDS
from rekatrain.rewards.shield import shielded
from rekatrain.rewards.trl_arguments import WRONG_FORM, Reports, make_arguments, read_form, trainer_state

if TYPE_CHECKING:  # compose.py imports the workers, which import this file
    from rekatrain.rewards.compose import RewardFunction

logger = logging.getLogger(__name__)

STDERR = 2
# Whatever a grader raises is its failure; sys.exit() too. A signal's handler raises KeyboardInterrupt.
FAILURES = (Exception, SystemExit)


class BatchCaller:
    """Calls one batch function; remembers whether it takes completions as text or as messages.

    timeout: seconds per batch
    """

    def __init__(self, reward: "RewardFunction", timeout: float) -> None:
        self.reward = reward
        # An outage of a server counts separately.
        self.timeout = timeout + float(getattr(reward.function, "outage_seconds", 0.0))
        self._as_messages = reward.conversational
        if self._as_messages is None:
            self._as_messages = False if reward.name in REWARDS else read_form(reward.function)
        called = reward.function
        # For an object, its method __call__ decides.
        self.is_async = inspect.iscoroutinefunction(called) or inspect.iscoroutinefunction(
            getattr(called, "__call__", None)  # noqa: B004
        )

    def call(self, arguments: Mapping[str, Any], size: int) -> list[Outcome]:
        """Score a batch by a plain function."""
        started = time.perf_counter()
        faulthandler.dump_traceback_later(self.timeout, exit=True, file=STDERR)
        try:
            with shielded():
                returned, reports = _drive(self._call_in_its_form(arguments))
        except FAILURES as error:
            return _failures(error, size, time.perf_counter() - started)
        finally:
            faulthandler.cancel_dump_traceback_later()
        return self._read(returned, reports, size, time.perf_counter() - started)

    async def call_async(self, arguments: Mapping[str, Any], size: int) -> list[Outcome]:
        """Score a batch by a coroutine function."""
        started = time.perf_counter()
        limit = asyncio.timeout(self.timeout)
        try:
            async with limit:
                returned, reports = await self._call_in_its_form(arguments)
        except FAILURES as error:
            timed_out = RewardError(f"no result after {self.timeout:g} seconds")
            return _failures(timed_out if limit.expired() else error, size, time.perf_counter() - started)
        return self._read(returned, reports, size, time.perf_counter() - started)

    async def _call_in_its_form(self, arguments: Mapping[str, Any]) -> tuple[Any, Reports]:
        """Call the function with text or messages; try both, once, if nothing says which it takes."""
        try:
            result = await self._call_once(arguments, as_messages=self._as_messages is True)
        except WRONG_FORM as error:
            if self._as_messages is not None:
                raise
            try:
                result = await self._call_once(arguments, as_messages=True)
            except FAILURES:
                raise error from None
            self._as_messages = True
            logger.info(
                "reward %s takes completions as messages: it failed on text (%s). Set rewards.%s.conversational to fix "
                "the form",
                self.reward.name,
                describe_error(error),
                self.reward.name,
            )
            return result
        self._as_messages = self._as_messages is True
        return result

    async def _call_once(self, arguments: Mapping[str, Any], *, as_messages: bool) -> tuple[Any, Reports]:
        reports = Reports()
        own = make_arguments(arguments, reports, as_messages=as_messages)
        returned = self.reward.function(**own)
        if self.is_async and isinstance(returned, Awaitable):
            returned = await returned
        return returned, reports

    def _read(self, returned: Any, reports: Reports, size: int, seconds: float) -> list[Outcome]:
        """Read the returned values, whatever they are; arrays and tensors of one dimension are lists too.

        Raises InputError if there is not one value per completion.
        """
        name = self.reward.name
        expected = f"expected a list of {size}, one finite number or None per completion"
        values = returned.tolist() if hasattr(returned, "tolist") else returned
        if not isinstance(values, Sequence) or isinstance(values, str | bytes):
            raise InputError(f"reward {name} returned {type(returned).__name__} {reprlib.repr(returned)}; {expected}")
        if len(values) != size:
            raise InputError(f"reward {name} returned {len(values)} values; {expected}")
        return reports.add_to(name, [read_value(value, seconds=seconds / size) for value in values])


def call_batch_functions(
    callers: Sequence[BatchCaller], arguments: Mapping[str, Any], size: int, progress: Progress
) -> dict[str, list[Outcome]]:
    """Return for each function an outcome of each of `size` completions.

    Plain functions are called first, one by one, then all coroutine functions at once. Raises InputError if a function
    does, or if it does not return one value per completion, and TrainingStopped for a server that is away too long.
    """
    if any(caller.reward.name not in REWARDS for caller in callers):  # the import is in no time limit
        arguments = {**arguments, "trainer_state": trainer_state(progress)}
    outcomes = {caller.reward.name: caller.call(arguments, size) for caller in callers if not caller.is_async}
    waiting = [caller for caller in callers if caller.is_async]
    if waiting:
        with shielded():
            outcomes.update(asyncio.run(_call_together(waiting, arguments, size)))
    return outcomes


async def _call_together(
    callers: Sequence[BatchCaller], arguments: Mapping[str, Any], size: int
) -> dict[str, list[Outcome]]:
    results = await asyncio.gather(*[caller.call_async(arguments, size) for caller in callers])
    return {caller.reward.name: outcomes for caller, outcomes in zip(callers, results, strict=True)}


def set_up(name: str, setup: Callable[[], object]) -> None:
    """Call the `setup` of a batch function; raise RewardError if it ends the process."""
    try:
        with shielded():
            setup()
    except SystemExit as error:
        raise RewardError(f"reward {name}: its setup called sys.exit({error.code!r})") from error


def _drive(call: Any) -> Any:
    """Run a coroutine that never waits, as the call of a plain function is one, without an event loop."""
    try:
        call.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("a plain function never waits")


def _failures(error: BaseException, size: int, seconds: float) -> list[Outcome]:
    """Return the failure of a whole batch as one error per completion; raise an error that ends the run instead."""
    if isinstance(error, InputError | TrainingStopped):
        raise error
    text = "".join(traceback.format_exception(error))
    outcome = Outcome(error=describe_error(error), traceback=text, seconds=seconds / max(size, 1))
    return [outcome] * size
