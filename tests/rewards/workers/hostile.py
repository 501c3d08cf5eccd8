"""A scorer that does to its worker what the completion says; a test's folder gets a copy."""

import builtins
import ctypes
import locale
import os
import random
import resource
import signal
import sys
import threading
import time

C = ctypes.CDLL(None)


class Mine(BaseException):
    pass


class NoText(Mine):
    def __str__(self):
        raise Mine("of the text")


class NoRepr:
    def __repr__(self):
        raise Mine("of the repr")


class NoNumber:
    ndim = 0

    def item(self):
        raise Mine("of the number")


def trace(*_):
    raise Mine("of the trace")


def later(seconds, function, *arguments):
    threading.Thread(target=lambda: (time.sleep(seconds), function(*arguments))).start()


def fork(then):
    if os.fork() == 0:
        then()
        os._exit(0)


def spread():
    for _ in range(20):
        threading.Thread(target=time.sleep, args=(1000,)).start()


def throw(error):
    raise error


def cut_limits():
    resource.setrlimit(resource.RLIMIT_AS, (1, 1))


# The completion -> what it does. The first ones end the worker, or are errors; those in HARMLESS score 0.5.
DEEDS = {
    "SIGKILL": lambda: C.kill(os.getpid(), 9),
    "SIGTERM": lambda: C.kill(os.getpid(), 15),
    "os.kill": lambda: os.kill(os.getpid(), 9),
    "os.kill all": lambda: os.kill(-1, 9),
    "exit 0": lambda: os._exit(0),
    "abort": os.abort,
    "null pointer": lambda: ctypes.string_at(0),
    "Mine": lambda: throw(Mine("x")),
    "GeneratorExit": lambda: throw(GeneratorExit()),
    "KeyboardInterrupt": lambda: throw(KeyboardInterrupt()),
    "NoText": lambda: throw(NoText()),
    "trace": lambda: sys.settrace(trace),
    "builtins": lambda: setattr(builtins, "len", None),
    "close all": lambda: [C.close(number) for number in range(1000)],
}
HARMLESS = {
    "fork": lambda: os.fork(),
    "fork and raise": lambda: fork(lambda: throw(ValueError("of the child"))),
    "parent killed later": lambda: fork(lambda: (time.sleep(0.1), os.kill(os.getppid(), 9))),
    "thread exits later": lambda: later(0.1, os._exit, 5),
    "threads": spread,
    "alarm": lambda: signal.setitimer(signal.ITIMER_REAL, 0.1),
    "SIGTERM ignored": lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN),
    "stdout": lambda: setattr(sys, "stdout", None),
    "stdout closed": lambda: sys.stdout.close(),
    "descriptors": lambda: [C.close(number) for number in range(3)],
    "locale": lambda: locale.setlocale(locale.LC_ALL, "C"),
    "umask": lambda: os.umask(0o777),
    "environment": os.environ.clear,
    "seed": lambda: random.seed(0),
    "clock": lambda: setattr(time, "perf_counter", None),
    "os": lambda: [setattr(os, name, None) for name in ("fchdir", "getpid", "_exit")],
    "limits": cut_limits,
    "recursion": lambda: sys.setrecursionlimit(60),
}


def deed(completion):
    word = completion.answer
    if word == "fine":
        print("fine", file=sys.stderr, end="")  # a closed stream would raise
        assert os.environ["PATH"] and os.umask(0o22) == 0o22
        return 1.0
    if word in ("NoRepr", "NoNumber"):
        return {"NoRepr": NoRepr, "NoNumber": NoNumber}[word]()
    {**DEEDS, **HARMLESS}[word]()
    return 0.5
