"""Inside a worker: its limits, the scorers that it makes, one completion scored at a time, and whatever that raises.

A worker is forked from a server process that has no threads and no torch. It dies with the training process, whatever
ends that and whatever the worker is doing.
"""

import fcntl
import math
import multiprocessing
import os
import reprlib
import resource
import select
import signal
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rekatrain.data.chat import parse_completion
from rekatrain.data.errors import InputError
from rekatrain.rewards.errors import RewardError
from rekatrain.rewards.registry import Spec
from rekatrain.rewards.workers.context import restore_environment

# Over a pipe that workers share, a message of at most PIPE_BUF bytes arrives whole or not at all if one is killed.
MAX_TRACEBACK = 2_000
OUT_OF_MEMORY = 77  # exit code of a worker


@dataclass(frozen=True, kw_only=True)
class Score:
    """What became of one completion and one reward.

    value:     the reward; None where it does not apply, or failed
    error:     one line, where the grader failed; else empty
    traceback: of that failure, where there is one
    seconds:   that it took, in the worker
    """

    value: float | None = None
    error: str = ""
    traceback: str = ""
    seconds: float = 0.0


_scorers: list[Callable[..., Any] | str | Score] = []  # of this worker; an error instead where one cannot be made


def start_worker(specs: Sequence[Spec], memory: int, folder: str, environment: Mapping[str, str | None]) -> None:
    """Set the limits and make the scorers. Its time does not count for any completion."""
    os.chdir(folder)
    os.environ.pop("PYTHONSAFEPATH", None)  # set for the forkserver alone: a grader may start scripts
    restore_environment(environment)
    os.environ["OMP_NUM_THREADS"] = "1"  # each worker is one core's, and numpy's threads reserve memory by the core
    _die_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # pebble's handler would wait for a C call that hangs
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _scorers[:] = [_make(spec) for spec in specs]


def _die_with_parent() -> None:
    """Have the kernel kill this worker when the training process ends, whose end of a pipe closes with it.

    A thread that waits for it would hear nothing during a call of C, and the server that forked this worker, which
    PR_SET_PDEATHSIG would watch, lives as long as its workers.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    pipe = parent.sentinel
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([pipe], [], [], 0)[0]:  # it has ended already
        os._exit(1)


def _make(spec: Spec) -> Callable[..., Any] | str | Score:
    try:
        scorer = spec.make()
        setup = getattr(scorer, "setup", None)
        if setup is not None:
            setup()
        return scorer
    except InputError as error:
        return str(error)
    except Exception as error:  # whatever a grader raises is its failure, to be told with each completion
        return _failure(error, seconds=0.0)


def do_nothing() -> None:
    pass


def score_completion(number: int, text: str, columns: Mapping[str, Any]) -> Score | str:
    """The score, or the message of an InputError: a plain value, whatever the scorer does."""
    scorer = _scorers[number]
    if not callable(scorer):
        return scorer
    started = time.perf_counter()
    try:
        value = check_number(scorer(parse_completion(text), **columns))
    except InputError as error:
        return str(error)[:MAX_TRACEBACK]
    except MemoryError:
        os._exit(OUT_OF_MEMORY)  # how much it still holds nobody knows: a fresh worker goes on
    except BaseException as error:  # whatever a grader raises is its failure, sys.exit() too
        return _failure(error, time.perf_counter() - started)
    return Score(value=value, seconds=time.perf_counter() - started)


def _failure(error: BaseException, seconds: float) -> Score:
    lines = traceback.format_exception(error)
    return Score(
        error=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
        traceback="".join(lines)[-MAX_TRACEBACK:],
        seconds=seconds,
    )


def check_number(value: Any) -> float | None:  # Any: whatever a user's function returns
    """The value as a float, None as it is; RewardError for anything else. numpy's and torch's scalars are numbers."""
    if value is None:
        return None
    number = value.item() if getattr(value, "ndim", None) == 0 else value
    if not isinstance(number, int | float) or not math.isfinite(number):
        raise RewardError(f"returned the value {reprlib.repr(value)}; expected one finite number or None a completion")
    return float(number)
