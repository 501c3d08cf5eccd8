"""Call the reward functions that score a whole batch, behind the shield of shield.py.

A plain function runs on the main thread, as in TRL, and cannot be interrupted there: one that hangs ends the process
and prints the stack of every thread. Coroutine functions run together (async_calls.py). A function that fails gives
errors, never values. It gets copies, which it may change.
"""

import copy
import faulthandler
import inspect
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rekatrain.data.errors import InputError, TrainingStopped
from rekatrain.rewards.errors import RewardError, describe_error, format_traceback, show
from rekatrain.rewards.outcome import MAX_REWARD, Outcome, read_value
from rekatrain.rewards.process_state import kept_state
from rekatrain.rewards.progress import Progress
from rekatrain.rewards.registry import REWARDS
from rekatrain.rewards.shield import shielded
from rekatrain.rewards.trl_arguments import WRONG_FORM, Reports, messages_of, read_form

if TYPE_CHECKING:  # compose.py imports the workers, which import this file
    from rekatrain.rewards.compose import RewardFunction

logger = logging.getLogger(__name__)

STDERR = 2
_perf_counter = time.perf_counter  # a reward may replace it in its module


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
        started = _perf_counter()
        faulthandler.dump_traceback_later(self.timeout, exit=True, file=STDERR)
        try:
            with kept_state() as interrupts:
                try:
                    with shielded():
                        returned, reports = _drive(self.call_in_its_form(arguments))
                        return self.read(returned, reports, size, _perf_counter() - started)
                except BaseException as error:
                    return failures(error, size, _perf_counter() - started, interrupts)
        finally:
            faulthandler.cancel_dump_traceback_later()

    async def call_in_its_form(self, arguments: Mapping[str, Any]) -> tuple[Any, Reports]:
        """Call the function with text or messages; try both, once, if nothing says which it takes."""
        try:
            result = await self._call_once(arguments, as_messages=self._as_messages is True)
        except WRONG_FORM as error:
            if self._as_messages is not None:
                raise
            try:
                result = await self._call_once(arguments, as_messages=True)
            except Exception:
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
        own, reports = copy.deepcopy(dict(arguments)), Reports()
        own |= messages_of(arguments) if as_messages else {}
        own |= {"log_metric": reports.log_metric, "log_extra": reports.log_extra}
        returned = self.reward.function(**own)
        if self.is_async and isinstance(returned, Awaitable):
            returned = await returned
        return returned, reports

    def read(self, returned: Any, reports: Reports, size: int, seconds: float) -> list[Outcome]:
        """Read the returned values, whatever they are; arrays and tensors of one dimension are lists too.

        Raises InputError if there is not one value per completion.
        """
        name = self.reward.name
        expected = f"expected a list of {size}, one finite number or None per completion"
        values = returned.tolist() if hasattr(returned, "tolist") else returned
        if not isinstance(values, Sequence) or isinstance(values, str | bytes):
            raise InputError(f"reward {name} returned {type(returned).__name__} {show(returned)}; {expected}")
        if len(values) != size:
            raise InputError(f"reward {name} returned {len(values)} values; {expected}")
        outcomes = [_read_one(value, seconds / size) for value in values]
        return reports.add_to(name, outcomes) if reports.metrics or reports.extra else outcomes


def call_batch_functions(
    callers: Sequence[BatchCaller], arguments: Mapping[str, Any], size: int, progress: Progress
) -> dict[str, list[Outcome]]:
    """Return for each function an outcome of each of `size` completions.

    Plain functions are called first, one by one, then all coroutine functions at once. Raises InputError if a function
    does, or if it does not return one value per completion, and TrainingStopped for a server that is away too long.
    """
    if any(caller.reward.name not in REWARDS for caller in callers):
        from transformers import TrainerState  # loads torch, so not at the top; here it is in no time limit

        state = TrainerState(global_step=progress.step, max_steps=progress.max_steps)
        arguments = {**arguments, "trainer_state": state}
    outcomes = {caller.reward.name: caller.call(arguments, size) for caller in callers if not caller.is_async}
    waiting = [caller for caller in callers if caller.is_async]
    if waiting:
        from rekatrain.rewards.async_calls import call_together

        outcomes.update(call_together(waiting, arguments, size))
    return outcomes


def set_up(name: str, setup: Callable[[], object]) -> None:
    """Call the `setup` of a batch function; raise RewardError if it would end the process."""
    with kept_state() as interrupts:
        try:
            with shielded():
                setup()
        except SystemExit as error:
            raise RewardError(f"reward {name}: its setup called sys.exit({error.code!r})") from error
        except BaseException as error:
            if isinstance(error, Exception) or any(error is one for one in interrupts):
                raise
            raise RewardError(f"reward {name}: its setup raised {describe_error(error)}") from error


def _read_one(value: Any, seconds: float) -> Outcome:
    """Read one value; Any: whatever a user's function returns."""
    if type(value) in (int, float) and abs(value) <= MAX_REWARD:  # the usual case
        return Outcome(value=float(value), seconds=seconds)
    return read_value(value, seconds=seconds)


def _drive(call: Any) -> Any:
    """Run a coroutine that never waits, as the call of a plain function is one, without an event loop."""
    try:
        call.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("a plain function never waits")


def failures(
    error: BaseException, size: int, seconds: float, interrupts: Sequence[BaseException] = ()
) -> list[Outcome]:
    """Return the failure of a whole batch as one error per completion; raise an error that ends the run instead.

    interrupts: errors of signal handlers. Whatever else a grader raises is its failure, a KeyboardInterrupt too.
    """
    if isinstance(error, InputError | TrainingStopped) or any(error is one for one in interrupts):
        raise error
    text = format_traceback(error)
    outcome = Outcome(error=describe_error(error), traceback=text, seconds=seconds / max(size, 1))
    return [outcome] * size
