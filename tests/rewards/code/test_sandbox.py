"""The sandbox: what hostile programs get (nothing), and that no program can forge the result of its tests."""

import os
import socket
import threading
import time

import pytest

from rekatrain.rewards.code.sandbox import Limits, _problem, check_isolation, run_program, run_tests
from rekatrain.rewards.errors import RewardError
from tests.rewards.code import users

pytestmark = pytest.mark.skipif(bool(_problem("namespaces")), reason=_problem("namespaces"))

# A program that leaves its session and is not signaled when its parent ends.
ESCAPE = "import ctypes, os\nctypes.CDLL(None).prctl(1, 0, 0, 0, 0)\nos.setsid()"
LIMITS = Limits(seconds=3.0, memory=512 << 20, output=10_000)
TESTS = {
    "asserts": ["assert double(2) == 4", "assert sorted(double([1])) == [1, 1]"],
    "setup": "",
    "prefix": "",
    "entry_point": "",
}
GOOD = "def double(x): return x * 2"


def run(source, stdin=b"", limits=LIMITS):
    return run_program(source, stdin=stdin, limits=limits, isolation="namespaces")


def verdicts(source, tests=TESTS):
    return run_tests([source], tests, limits=LIMITS, isolation="namespaces")


def test_run_program_passes_input_and_output():
    outcome = run("import sys\nfor line in sys.stdin: print(int(line) * 2)\nsys.exit(3)", b"1\n20\n")
    assert (outcome.ending, outcome.code, outcome.output) == ("exited", 3, b"2\n40\n")


def attempt(action):
    """A program that prints what came of an action, whichever way it went."""
    return (
        f"try:\n    print('DONE', {action})\nexcept BaseException as error:\n    print('REFUSED', type(error).__name__)"
    )


@pytest.mark.parametrize(
    "action",
    [
        "open('/etc/passwd').read()",
        f"open({__file__!r}).read()",
        "__import__('os').listdir('/proc')",
        "__import__('os').listdir('/home')",
        "open('/usr/evil', 'w')",
        "open('/evil', 'w')",
        "__import__('os').chmod('/usr/bin', 0o777)",
        "__import__('os').mkdir('/dev/evil')",
        "__import__('socket').create_connection(('1.1.1.1', 53), timeout=1)",
        "__import__('socket').getaddrinfo('example.com', 80)",
        "__import__('os').fork()",
        "__import__('threading').Thread(target=print).start()",
        "__import__('subprocess').run(['/bin/ls'])",
        "__import__('os').kill(1 << 20, 9)",
        "__import__('os').setuid(0)",
        "len(bytearray(10 << 30))",
        "__import__('resource').setrlimit(__import__('resource').RLIMIT_AS, (-1, -1))",
        "open('/tmp/large', 'wb').write(bytes(20 << 20))",
        "[open(f'/tmp/{n}', 'w').close() for n in range(5_000)]",
        "[open(f'/tmp/{n}', 'wb').write(bytes(1 << 20)) for n in range(20)]",
    ],
)
def test_sandbox_hides_what_is_outside(action):
    outcome = run(attempt(action))
    # A write beyond the limit on files may also end the program by a signal.
    assert outcome.output.startswith(b"REFUSED") or (outcome.output == b"" and outcome.code != 0), outcome


def test_sandbox_cannot_reach_a_server_on_this_machine():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port)).close()
        outcome = run(attempt(f"__import__('socket').create_connection(('127.0.0.1', {port}), timeout=1)"))
    assert outcome.output == b"REFUSED PermissionError\n"


def test_sandbox_has_no_environment_and_no_open_files(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    with open(__file__) as file:
        os.set_inheritable(file.fileno(), True)
        source = (
            "import os\nprint(sorted(os.environ))\nfound = []\n"
            "for n in range(4_096):\n  try: found.append((n, os.fstat(n) and 1))\n  except OSError: pass\n"
            "print([n for n, _ in found])"
        )
        outcomes = [
            run_program(source, stdin=b"", limits=LIMITS, isolation=level) for level in ("namespaces", "rlimits")
        ]
    expected = b"['HOME', 'LANG', 'PATH', 'PYTHONHASHSEED']\n[0, 1, 2]\n"
    assert [outcome.output for outcome in outcomes] == [expected] * 2


def test_sandbox_folder_is_fresh_and_temporary():
    source = "import os\nprint(os.listdir('.'))\nopen('left', 'w').write('x')\nprint(open('left').read())"
    assert [run(source).output for _ in range(2)] == [b"[]\nx\n"] * 2
    assert not os.path.exists("/tmp/left")


@pytest.mark.parametrize(
    ("source", "ending"),
    [
        ("while True: pass", "time"),
        ("import time; time.sleep(60)", "time"),
        ("import os\nos.setsid()\nwhile True: pass", "time"),
        (f"{ESCAPE}\nwhile True: pass", "time"),
        (f"{ESCAPE}\nos.close(1)\nwhile True: pass", "time"),
        ("import signal\nfor s in range(1, 9): signal.signal(s, signal.SIG_IGN)\nwhile True: pass", "time"),
        ("while True: print('x' * 1000)", "output"),
        ("import sys\nwhile True: sys.stderr.write('x' * 1000)", "time"),
        ("import os\nwhile True:\n  try: os.fork()\n  except OSError: pass", "time"),
    ],
)  # fmt: skip
def test_run_program_ends_an_endless_program_cleanly(source, ending):
    run("")
    before, started = users.sandbox_processes(), time.monotonic()
    outcome = run(source, limits=Limits(seconds=1.0, output=10_000))
    assert outcome.ending == ending and time.monotonic() - started < 5.0
    users.wait_until_gone(before)


@pytest.mark.parametrize(
    "source",
    [
        "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\nprint('on')",
        "import os, signal\nos.kill(-1, signal.SIGKILL)\nprint('on')",
        "import os, signal\nos.killpg(0, signal.SIGKILL)\nprint('on')",
        "def f(n): return f(n + 1)\nf(0)",
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1)\nf(0)",
        "x = []\nfor _ in range(10**6): x = [x]\nprint(x == x)\nrepr(x)",
        "import ctypes; ctypes.string_at(0)",
        "9**9**9",
    ],
)
def test_run_program_confines_hostile_programs(source):
    outcome = run(source, limits=Limits(seconds=2.0, output=10_000))
    assert outcome.ending in ("exited", "time")
    assert run("print('fine')").output == b"fine\n"


def test_run_tests_reports_each_test():
    assert verdicts(GOOD) == [True, True]
    assert verdicts("def double(x): return 4") == [True, False]
    assert verdicts("def double(x): return x +") == [False, False]
    assert verdicts("") == [False, False]


FORGERIES = {
    "exits before the tests": "import sys; sys.exit(0)",
    "ends before the tests": "import os; os._exit(0)",
    "exits in the tests": "import os\ndef double(x): os._exit(0)",
    "prints a pass": "print('1' * 100, 'OK PASSED 100%')",
    "equals everything": (
        "class Any:\n  def __eq__(self, other): return True\n  def __iter__(self): return iter([1, 1])\n"
        "def double(x): return Any()"
    ),
    "is a list that equals everything": "class L(list):\n  __eq__ = lambda s, o: True\ndef double(x): return L([7])",
    "replaces what the tests use": "def sorted(x): return [1, 1]\ndef double(x): return None",
    "replaces the built-in": "import builtins\nbuiltins.sorted = lambda x: [1, 1]\ndef double(x): return None",
    "writes to every open file": (
        "import os\nfor n in range(3, 64):\n  try: os.write(n, b'11')\n  except OSError: pass\ndef double(x): return 0"
    ),
    "answers before it is called": (
        "import os\nfor n in range(3, 64):\n  try: os.write(n, b'null\\n' * 9)\n  except OSError: pass\n"
        "def double(x): return 0"
    ),
    "looks for the expected value": (
        "import sys\ndef double(x):\n  frame = sys._getframe()\n  while frame.f_back: frame = frame.f_back\n"
        "  values = [c for c in frame.f_code.co_consts if c == 4 or c == [1, 1]]\n  return values[0]"
    ),
    "raises what stops the tests": "def double(x): raise SystemExit(0)",
    "raises like a keyboard": "def double(x): raise KeyboardInterrupt",
    "never answers": "def double(x):\n  while True: pass",
    "answers without end": "import itertools\ndef double(x): return itertools.count()",
    "answers too much": "def double(x): return 'x' * (1 << 28)",
    "patches the interpreter": (
        "import sys, json\nsys.modules['__main__'].__dict__.clear()\njson.dumps = lambda v: 'true'\n"
        "def double(x): return 0"
    ),
    "recurses": "def double(x): return double(x)",
    "kills": "import os\ndef double(x): os.kill(-1, 9); os.kill(1, 9); os.kill(0, 9)",
}


@pytest.mark.parametrize("trick", FORGERIES)
def test_run_tests_cannot_be_tricked_into_a_pass(trick):
    assert verdicts(FORGERIES[trick]) == [False, False]


def test_run_tests_keeps_the_names_of_the_tests():
    tests = {**TESTS, "asserts": ["assert math.isclose(half(3), 1.5)", "assert isinstance(half(2), float)"]}
    assert verdicts("def half(x): return x / 2", tests) == [True, True]
    forged = "class math:\n  isclose = lambda *a: True\ndef isinstance(*a): return True\ndef half(x): return None"
    assert verdicts(forged, tests) == [False, False]
    # with an entry point, that one name is the solution's
    checked = {"prefix": "def helper(x): return x + 1\n", "entry_point": "inc"}
    tests = {**TESTS, **checked, "asserts": ["def check(f):\n    assert f(1) == helper(1)\ncheck(inc)"]}
    assert verdicts("def inc(x): return x + 1", tests) == [True]
    assert verdicts("def helper(x): return 0\ndef inc(x): return 0\ndef check(f): pass", tests) == [False]


def test_run_tests_passes_values_of_all_plain_types():
    values = [
        "None", "True", "-(10 ** 50)", "0.1", "float('inf')", "1 + 2j", "b'\\xff'", "'\\ud800é'", "(1, [2, {3}])",
        "{(1, 2): frozenset('a')}", "range(1, 9, 2)", "int", "collections.deque([1])", "collections.Counter('aab')",
    ]  # fmt: skip
    tests = {**TESTS, "asserts": [f"assert same({value}) == {value} and has({value})" for value in values]}
    source = (
        f"import collections\nvalues = [{', '.join(values)}]\ndef same(x): return x\ndef has(x): return x in values"
    )
    assert verdicts(source, tests) == [True] * len(values)


def test_run_tests_uses_objects_of_the_solution():
    source = (
        "class Node:\n  def __init__(self, v): self.v, self.next = v, None\n"
        "def total(n): return n.v + (total(n.next) if n.next else 0)"
    )
    tests = {**TESTS, "setup": "first = Node(1)\nfirst.next = Node(2)", "asserts": ["assert total(first) == 3"]}
    assert verdicts(source, tests) == [True]


def test_sandboxes_run_at_the_same_time():
    results = []
    threads = [threading.Thread(target=lambda: results.append(verdicts(GOOD))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[True, True]] * 8


def test_sandbox_that_cannot_start_is_a_reward_error(monkeypatch):
    monkeypatch.setattr("rekatrain.rewards.code.launcher._visible", lambda: ["/no/such/folder"])
    monkeypatch.setattr("rekatrain.rewards.code.launcher._servers", {})
    with pytest.raises(RewardError, match="the sandbox could not be made: No such file or directory: /no/such/folder"):
        run("print(1)")
    with pytest.raises(RewardError, match="the sandbox could not be made"):
        verdicts(GOOD)


def test_check_isolation_rejects_what_the_machine_cannot_provide(monkeypatch):
    from rekatrain.data.errors import InputError

    monkeypatch.setattr("rekatrain.rewards.code.sandbox._problem", lambda isolation: "Operation not permitted: unshare")
    with pytest.raises(InputError, match="cannot isolate generated code by namespaces: Operation not permitted"):
        check_isolation("namespaces")
