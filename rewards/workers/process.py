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
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from rekatrain.data.chat import parse_completion
from rekatrain.data.errors import InputError
from rekatrain.rewards.errors import describe_error, format_traceback
from rekatrain.rewards.outcome import MAX_WORKER_NOTES, Outcome, read_value
from rekatrain.rewards.process_state import ProcessState
from rekatrain.rewards.registry import REWARDS, Spec
from rekatrain.rewards.shield import CLOSING, open_descriptors, shielded
from rekatrain.rewards.workers.environment import set_environment

MAX_TRACEBACK = 2_000
OUT_OF_MEMORY = 77  # exit code of a worker
# Threads that scorers may leave behind: a client keeps some. Beyond that, the worker is replaced.
MAX_THREADS = 16
LIMITS = (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_NOFILE, resource.RLIMIT_STACK, resource.RLIMIT_FSIZE)
GUARDED = (*CLOSING, "os.kill", "os.killpg")  # os.kill(-1, ...) would reach the training process
_perf_counter, _getpid, _exit_at_once = time.perf_counter, os.getpid, os._exit  # a scorer may replace them

# The scorers of this worker. For one that cannot be made: the message of an InputError, or the Outcome of its failure.
_scorers: list[Callable[..., Any] | str | Outcome] = []
_kept: set[int] = set()  # descriptors that no scorer may close
_states: dict[int, ProcessState] = {}  # for each scorer of the user's: what is restored after its calls


def serve(
    tasks: Connection, specs: Sequence[Spec], memory: int, folder: str, environment: Mapping[str, str | None]
) -> None:
    """Score the completions that come over `tasks`, until it is closed.

    The first message says that the scorers are made. Each answer is an outcome, and False if the worker should be
    replaced.
    """
    start_worker(specs, memory, folder, environment)
    limits = [resource.getrlimit(limit) for limit in LIMITS]
    tasks.send(None)
    while True:
        try:
            task = tasks.recv()
        except EOFError:
            _exit_at_once(0)
        answer = score_completion(*task)
        is_fit = threading.active_count() <= MAX_THREADS and limits == [resource.getrlimit(limit) for limit in LIMITS]
        tasks.send((answer, is_fit))


def start_worker(specs: Sequence[Spec], memory: int, folder: str, environment: Mapping[str, str | None]) -> None:
    """Set the limits and make the scorers. This time counts for no completion."""
    os.setsid()  # os.killpg(0, ...) in a scorer must not reach the training process
    os.chdir(folder)
    set_environment(environment)
    os.environ["OMP_NUM_THREADS"] = "1"  # a worker has one core, and numpy's threads reserve memory for each core
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _scorers[:] = [_make(spec) for spec in specs]
    state = ProcessState()
    _states.update({number: state for number, spec in enumerate(specs) if spec.name not in REWARDS})
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
    except BaseException as error:  # whatever a grader raises is its failure, reported with each completion
        return _failure(error, seconds=0.0)


def score_completion(number: int, text: str, columns: Mapping[str, Any]) -> Outcome | str:
    """Return the score, or the message of an InputError: plain values, whatever the scorer does."""
    scorer = _scorers[number]
    if not callable(scorer):
        return scorer
    started, process = _perf_counter(), _getpid()
    try:
        with shielded(GUARDED, _kept):
            value = scorer(parse_completion(text), **columns)
        return read_value(value, seconds=_perf_counter() - started, max_notes=MAX_WORKER_NOTES)
    except InputError as error:
        return str(error)[:MAX_TRACEBACK]
    except MemoryError:
        _exit_at_once(OUT_OF_MEMORY)  # how much memory is still held is unknown: a fresh worker goes on
    except BaseException as error:  # whatever a grader raises is its failure, sys.exit() too
        return _failure(error, _perf_counter() - started)
    finally:
        if _getpid() != process:  # a child that the scorer forked
            _exit_at_once(0)
        if number in _states:
            _states[number].restore()


def _failure(error: BaseException, seconds: float) -> Outcome:
    return Outcome(error=describe_error(error), traceback=format_traceback(error)[-MAX_TRACEBACK:], seconds=seconds)
