"""The inside of a worker: it sets its limits, makes the scorers, and scores one completion at a time.

A worker is forked from a server process that has no threads and no torch. It dies with the training process, however
that ends and whatever the worker is doing.
"""

import fcntl
import multiprocessing
import os
import resource
import select
import signal
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rekatrain.data.chat import parse_completion
from rekatrain.data.errors import InputError
from rekatrain.rewards.calls import CLOSING, open_descriptors, shielded
from rekatrain.rewards.errors import describe_error
from rekatrain.rewards.outcome import MAX_WORKER_NOTES, Outcome, read_value
from rekatrain.rewards.registry import Spec
from rekatrain.rewards.workers.environment import set_environment

# If a worker is killed, a message of at most PIPE_BUF bytes over the shared pipe arrives whole or not at all.
MAX_TRACEBACK = 2_000
OUT_OF_MEMORY = 77  # exit code of a worker


# The scorers of this worker. For one that cannot be made: the message of an InputError, or the Outcome of its failure.
_scorers: list[Callable[..., Any] | str | Outcome] = []
_kept: set[int] = set()  # descriptors that no scorer may close


def start_worker(specs: Sequence[Spec], memory: int, folder: str, environment: Mapping[str, str | None]) -> None:
    """Set the limits and make the scorers. This time counts for no completion."""
    os.setsid()  # os.killpg(0, ...) in a scorer must not reach the training process
    os.chdir(folder)
    set_environment(environment)
    os.environ["OMP_NUM_THREADS"] = "1"  # a worker has one core, and numpy's threads reserve memory for each core
    _die_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # pebble's handler would wait for a C call that hangs
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _scorers[:] = [_make(spec) for spec in specs]
    _kept.update(open_descriptors())


def _die_with_parent() -> None:
    """Have the kernel kill this worker when the training process ends, which closes its end of a pipe.

    A thread that waits for the pipe would not run during a call of C. PR_SET_PDEATHSIG would watch the server that
    forked this worker, which lives as long as its workers.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None
    pipe = parent.sentinel
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([pipe], [], [], 0)[0]:  # it has ended already
        os._exit(1)


def _make(spec: Spec) -> Callable[..., Any] | str | Outcome:
    try:
        scorer = spec.make()
        setup = getattr(scorer, "setup", None)
        if setup is not None:
            setup()
        return scorer
    except InputError as error:
        return str(error)
    except (Exception, SystemExit) as error:  # whatever a grader raises is its failure, reported with each completion
        return _failure(error, seconds=0.0)


def do_nothing() -> None:
    """Return None: a first job, with which a pool starts its workers."""


def score_completion(number: int, text: str, columns: Mapping[str, Any]) -> Outcome | str:
    """Return the score, or the message of an InputError: plain values, whatever the scorer does."""
    scorer = _scorers[number]
    if not callable(scorer):
        return scorer
    started = time.perf_counter()
    try:
        with shielded(CLOSING, _kept):
            value = scorer(parse_completion(text), **columns)
    except InputError as error:
        return str(error)[:MAX_TRACEBACK]
    except MemoryError:
        os._exit(OUT_OF_MEMORY)  # how much memory is still held is unknown: a fresh worker goes on
    except BaseException as error:  # whatever a grader raises is its failure, sys.exit() too
        return _failure(error, time.perf_counter() - started)
    return read_value(value, seconds=time.perf_counter() - started, max_notes=MAX_WORKER_NOTES)


def _failure(error: BaseException, seconds: float) -> Outcome:
    text = "".join(traceback.format_exception(error))
    return Outcome(error=describe_error(error), traceback=text[-MAX_TRACEBACK:], seconds=seconds)
