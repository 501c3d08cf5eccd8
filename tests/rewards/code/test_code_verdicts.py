"""code_tests: right code of every kind passes, wrong code does not, and tests that cannot run are errors."""

import json

import pytest

from rekatrain.data.chat import parse_completion, render_completion
from rekatrain.data.errors import InputError
from rekatrain.rewards.code.code_tests import CodeTests
from rekatrain.rewards.code.sandbox import _problem
from rekatrain.rewards.errors import RewardError

pytestmark = pytest.mark.skipif(bool(_problem("namespaces")), reason=_problem("namespaces"))


def grade(code, tests, **options):
    completion = parse_completion(render_completion("Hm.", f"```python\n{code}\n```"))
    return CodeTests(**{"time_limit": 10.0, "memory_limit_mb": 2048, **options})(completion, tests=tests)


SUM = [{"input": "1 2\n", "output": "3\n"}]
PROGRAMS = {
    "exit": "print(sum(map(int, input().split())))\nexit()",
    "quit with a code": "print(sum(map(int, input().split())))\nquit(0)",
    "exit in a function": "def main():\n  print(sum(map(int, input().split())))\n  exit(0)\nmain()",
    "thread": (
        "import sys, threading\nsys.setrecursionlimit(10**6)\nthreading.stack_size(1 << 26)\n"
        "def main(): print(sum(map(int, input().split())))\nt = threading.Thread(target=main)\nt.start()\nt.join()"
    ),
    "thread without join": (
        "import threading, time\ndef main():\n  time.sleep(.1)\n  print(3)\nthreading.Thread(target=main).start()"
    ),
    "/dev/stdin": "print(sum(map(int, open('/dev/stdin').read().split())))",
    "/dev/stdin, binary": (
        "import sys\nsys.stdout.write(str(sum(map(int, open('/dev/stdin', 'rb').readline().split()))))"
    ),
    "file descriptor 0": "print(sum(map(int, open(0))) if False else sum(map(int, open(0).read().split())))",
    "pathlib": "import pathlib\nprint(sum(map(int, pathlib.Path('/dev/stdin').read_text().split())))",
    "numpy": "import numpy as np\nprint(np.array(input().split(), dtype=int).sum())",
    "sys.stdin.buffer": "import sys\nprint(sum(map(int, sys.stdin.buffer.read().split())))",
    "main guard": "if __name__ == '__main__':\n  print(sum(map(int, input().split())))",
    "os.read": "import os\nprint(sum(map(int, os.read(0, 1000).split())))",
    "asyncio": "import asyncio\nasync def main(): print(sum(map(int, input().split())))\nasyncio.run(main())",
}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_code_tests_pass_right_programs(kind):
    pytest.importorskip("numpy") if kind == "numpy" else None
    assert grade(PROGRAMS[kind], SUM) == 1.0


def test_code_tests_read_a_large_output_and_reject_a_wrong_end():
    size = 1_500_000
    expected = "\n".join(map(str, range(size)))
    assert len(expected) > 10_000_000
    program = f"print('\\n'.join(map(str, range({size}))))"
    assert grade(program, [{"input": "", "output": expected}]) == 1.0
    assert grade(program, [{"input": "", "output": expected + "1"}]) == 0.0


@pytest.mark.parametrize(
    ("printed", "expected", "exact", "tolerant"),
    [
        ("0.5", "0.500000", 0.0, 1.0),
        ("1  2", "1 2", 0.0, 1.0),
        (" 7", "7", 0.0, 1.0),
        ("3.14159", "3.14160", 0.0, 0.0),
        ("1e-3", "0.001", 0.0, 1.0),
        ("nan", "1", 0.0, 0.0),
        ("1 2 3", "1 2", 0.0, 0.0),
        ("YES", "NO", 0.0, 0.0),
        ("7  \n\n", "7", 1.0, 1.0),
    ],
)
def test_code_tests_tolerance_compares_numbers(printed, expected, exact, tolerant):
    tests = [{"input": "", "output": expected}]
    program = f"print({printed!r})"
    assert (grade(program, tests), grade(program, tests, tolerance=1e-6)) == (exact, tolerant)


def test_code_tests_checker_decides_and_its_failure_is_an_error():
    pairs = [{"input": "10\n", "output": "3 7\n"}]
    function = "def check(input, expected, output):\n  return sum(map(int, output.split())) == int(input)"
    program = (
        "import sys\nn, right, got = (open(name).read() for name in sys.argv[1:])\n"
        "print(100 if sum(map(int, got.split())) == int(n) else 0)"
    )
    for checker in (function, program):
        tests = {"programs": pairs, "checker": checker}
        assert (grade("print(4, 6)", tests), grade("print(4, 5)", tests)) == (1.0, 0.0)
    with pytest.raises(RewardError, match="the checker of the row gave no verdict"):
        grade("print(4, 6)", {"programs": pairs, "checker": "raise ValueError"})


def test_code_tests_time_limit_is_per_test():
    slow = "import time\ntime.sleep(0.6)\nprint(3)"
    assert grade(slow, SUM * 3, time_limit=1.5) == 1.0
    statements = ["assert f(1) == 2"] * 3
    assert grade("import time\ndef f(x):\n  time.sleep(0.6)\n  return x + 1", statements, time_limit=1.5) == 1.0
    assert grade("def f(x):\n  while True: pass", statements, time_limit=0.5) == 0.0
    with pytest.raises(RewardError, match=r"need more than total_time_limit \(1 s\)"):
        grade(slow, SUM * 9, time_limit=1.5, total_time_limit=1)


FUNCTIONS = {
    "in place, list": ("def f(x): x.sort()", ["a = [3, 1]\nf(a)\nassert a == [1, 3]"], "def f(x): pass"),
    "in place, nested": (
        "def f(m):\n  for row in m: row.reverse()",
        ["m = [[1, 2], [3, 4]]\nrow = m[0]\nf(m)\nassert m == [[2, 1], [4, 3]] and row == [2, 1]"],
        "def f(m): m.clear()",
    ),
    "in place, dict and set": (
        "def f(d, s):\n  d['a'] = 1\n  s.add(2)",
        ["d, s = {}, set()\nf(d, s)\nassert d == {'a': 1} and s == {2}"],
        "def f(d, s): d['a'] = 2",
    ),
    "in place, keyword": ("def f(*, x): x.append(1)", ["a = []\nf(x=a)\nassert a == [1]"], "def f(*, x): pass"),
    "lambda": ("def f(g, x): return g(g(x))", ["assert f(lambda v: v + 1, 1) == 3"], "def f(g, x): return g(x)"),
    "builtin": (
        "def f(g, x): return [g(v) for v in x]",
        ["assert f(len, ['a', 'bb']) == [1, 2]"],
        "def f(g, x): return x",
    ),
    "key function": (
        "def f(x, key): return sorted(x, key=key)",
        ["assert f(['bb', 'a'], key=lambda v: len(v)) == ['a', 'bb']"],
        "def f(x, key): return x",
    ),
    "callback that raises": (
        "def f(g):\n  try: return g()\n  except KeyError: return 'no'",
        ["def g(): return {}['x']\nassert f(g) == 'no'"],
        "def f(g): return None",
    ),
    "callback that calls back": (
        "def f(g, n): return g(n)\ndef h(n): return n * 2",
        ["assert f(lambda n: h(n) + 1, 4) == 9"],
        "def f(g, n): return n\ndef h(n): return n",
    ),
    "decorator": (
        "def twice(g):\n  def inner(x): return g(g(x))\n  return inner",
        ["assert twice(lambda v: v * 3)(2) == 18"],
        "def twice(g): return g",
    ),
    "Decimal": (
        "from decimal import Decimal\ndef f(x): return x / 4",
        ["from decimal import Decimal\nassert f(Decimal('1')) == Decimal('0.25')"],
        "def f(x): return x",
    ),
    "Fraction": (
        "from fractions import Fraction\ndef f(a, b): return Fraction(a, b)",
        ["from fractions import Fraction\nassert f(2, 4) == Fraction(1, 2)"],
        "def f(a, b): return (a, b)",
    ),
    "dates": (
        "import datetime\ndef f(d): return d + datetime.timedelta(days=1)",
        [
            "import datetime\nassert f(datetime.date(2024, 2, 28)) == datetime.date(2024, 2, 29)",
            "from datetime import datetime\nassert f(datetime(2024, 1, 1, 5)) == datetime(2024, 1, 2, 5)",
        ],
        "def f(d): return d",
    ),
    "class with == and len": (
        "class Bag:\n  def __init__(s, *x): s.x = list(x)\n  def __eq__(s, o): return sorted(s.x) == sorted(o.x)\n"
        "  def __len__(s): return len(s.x)\n  def __iter__(s): return iter(s.x)\n"
        "  def __str__(s): return f'Bag{s.x}'\n"
        "  def __contains__(s, v): return v in s.x\n  def __getitem__(s, i): return s.x[i]\n"
        "  def __add__(s, o): return Bag(*s.x, *o.x)\n  def __lt__(s, o): return len(s) < len(o)",
        [
            "assert Bag(1, 2) == Bag(2, 1) and Bag(1) != Bag(2)",
            "assert len(Bag(1, 2)) == 2",
            "assert list(Bag(1, 2)) == [1, 2]",
            "assert str(Bag(1)) == 'Bag[1]'",
            "assert 2 in Bag(1, 2) and 3 not in Bag(1)",
            "assert Bag(4, 5)[1] == 5",
            "assert Bag(1) + Bag(2) == Bag(1, 2)",
            "assert isinstance(Bag(1), Bag) and not isinstance(1, Bag)",
            "assert sorted([Bag(1, 2), Bag(3)])[0] == Bag(3)",
            "assert [v * 2 for v in Bag(1, 2)] == [2, 4]",
            "assert bool(Bag()) is False",
        ],
        "class Bag:\n  def __init__(s, *x): pass",
    ),
    "own exception": (
        "class TooSmall(ValueError):\n  def __init__(s, n):\n    super().__init__(f'{n} is too small')\n    s.n = n\n"
        "def f(n):\n  if n < 0: raise TooSmall(n)\n  return n",
        [
            (
                "try:\n  f(-1)\nexcept TooSmall as error:\n"
                "  assert str(error) == '-1 is too small' and error.n == -1\nelse:\n  assert False"
            ),
            "try:\n  f(-1)\nexcept ValueError:\n  pass\nelse:\n  assert False",
            "assert f(1) == 1",
        ],
        "class TooSmall(Exception): pass\ndef f(n): return n",
    ),
    "message of an exception": (
        "def f(): raise ValueError('no good')",
        ["try:\n  f()\nexcept ValueError as error:\n  assert str(error) == 'no good'\nelse:\n  assert 0"],
        "def f(): raise ValueError('other')",
    ),
    "async": (
        "import asyncio\nasync def f(x):\n  await asyncio.sleep(0)\n  return x + 1",
        [
            "import asyncio\nassert asyncio.run(f(1)) == 2",
            (
                "import asyncio\nasync def main(): return await asyncio.gather(f(1), f(2))\n"
                "assert asyncio.run(main()) == [2, 3]"
            ),
        ],
        "async def f(x): return x",
    ),
    "dataclass": (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Point:\n  x: int\n  y: int\n"
        "def f(a): return Point(a, a)",
        [
            "assert f(1) == Point(1, 1) and f(1) != Point(1, 2)",
            "assert f(3).x == 3",
            "assert repr(f(1)) == 'Point(x=1, y=1)'",
        ],
        "def f(a): return None\nPoint = dict",
    ),
    "object of the tests": (
        "def depth(n): return 0 if n is None else 1 + max(depth(n.left), depth(n.right))",
        [
            "class Node:\n  def __init__(self, left=None, right=None): self.left, self.right = left, right\n"
            "assert depth(Node(Node(), None)) == 2"
        ],
        "def depth(n): return 0",
    ),
    "context manager": (
        (
            "class Log:\n  def __init__(s): s.n = 0\n  def __enter__(s):\n"
            "    s.n += 1\n    return s\n  def __exit__(s, *a): s.n += 10"
        ),
        ["log = Log()\nwith log as inner:\n  assert inner.n == 1\nassert log.n == 11"],
        "class Log: pass",
    ),
    "generator": (
        "def f(n):\n  for i in range(n): yield i",
        ["assert list(f(3)) == [0, 1, 2]"],
        "def f(n): return [n]",
    ),
    "numpy in the tests": (
        "def f(x): return x * 2",
        ["import numpy as np\nassert np.allclose(f(1.5), 3.0)"],
        "def f(x): return x",
    ),
}


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_code_tests_pass_right_functions_and_fail_wrong_ones(kind):
    right, tests, wrong = FUNCTIONS[kind]
    assert grade(right, tests) == 1.0
    assert grade(wrong, tests) == 0.0


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        (["assert f(1) =="], "test 1 is no Python"),
        ({"asserts": ["assert f(1) == 1"], "setup": "x = 1 / 0"}, "the setup raises ZeroDivisionError"),
        ({"asserts": ["assert f(1) == 1"], "setup": "import no_such_module"}, "the setup raises ModuleNotFoundError"),
        (["import no_such_module\nassert f(1) == 1"], "test 1 needs a module: No module named 'no_such_module'"),
        ({"asserts": ["check(f)"], "prefix": "def broken(", "entry_point": "f"}, "prefix is no Python"),
    ],
)
def test_code_tests_that_cannot_run_are_errors(tests, message):
    with pytest.raises(RewardError, match=f"the tests cannot run: {message}"):
        grade("def f(x): return x", tests)


def test_code_tests_reject_a_memory_limit_in_which_nothing_runs():
    with pytest.raises(InputError, match="memory_limit_mb is 5, in which Python hardly starts"):
        CodeTests(memory_limit_mb=5)


ADD = "def add(a, b):\n    return a + b"
METHOD = "class Solution:\n    def add(self, a: int, b: int) -> int:\n        return a + b"
PROGRAM = "print(sum(map(int, input().split())))"
LAYOUTS = {
    "LiveCodeBench, stdin": (PROGRAM, json.dumps([{"input": "1 2\n", "output": "3\n", "testtype": "stdin"}])),
    "LiveCodeBench, functional": (METHOD, [{"input": "1\n2", "output": "3", "testtype": "functional"}]),
    "LiveCodeBench, metadata": (
        METHOD,
        {
            "public_test_cases": json.dumps([{"input": "1\n2", "output": "3", "testtype": "functional"}]),
            "metadata": '{"func_name": "add"}',
        },
    ),
    "APPS": (PROGRAM, json.dumps({"inputs": ["1 2\n"], "outputs": ["3\n"]})),
    "APPS, object": (PROGRAM, {"input_output": json.dumps({"inputs": [["1 2"]], "outputs": [["3"]]})}),
    "APPS, function": (METHOD, {"inputs": [[1, 2]], "outputs": [[3]], "fn_name": "add"}),
    "TACO, function": (ADD, json.dumps({"fn_name": "add", "inputs": [[1, 2], [0, 0]], "outputs": [3, 0]})),
    "CodeContests": (PROGRAM, {"input": ["1 2\n", "4 5\n"], "output": ["3\n", "9\n"]}),
    "KodCode": (
        ADD,
        (
            "from solution import add\n\ndef test_small():\n"
            "    assert add(1, 2) == 3\n\ndef test_zero():\n    assert add(0, 0) == 0\n"
        ),
    ),
    "SYNTHETIC-1, function": (
        ADD,
        json.dumps(
            {
                "language": "python",
                "test_cases": [{"fn_name": "add", "type": "function_call", "input": [1, 2], "output": 3}],
            }
        ),
    ),
    "SYNTHETIC-1, stdin": (PROGRAM, {"test_cases": [{"type": "stdin_stdout", "input": "1 2\n", "output": "3\n"}]}),
    "EvalPlus": (
        ADD,
        {
            "entry_point": "add",
            "prompt": "def add(a, b):\n    pass\n",
            "test": (
                "import numpy as np\n\ndef check(candidate):\n    for a, b, c in [(1, 2, 3), (0, 0, 0)]:\n"
                "        assert np.allclose(candidate(a, b), c)\n"
            ),
        },
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_code_tests_read_published_layouts(layout):
    code, tests = LAYOUTS[layout]
    assert grade(code, tests) == 1.0
    assert grade(code.replace("sum(map", "max(map").replace("a + b", "a - b - 1"), tests) == 0.0


@pytest.mark.parametrize(
    "tests",
    [
        "no tests",
        {"inputs": ["1"], "outputs": []},
        [{"input": "1"}],
        {"test_cases": [{"input": 1, "output": 2}]},
        7,
        [1, "a"],
    ],
)
def test_code_tests_reject_a_malformed_row(tests):
    with pytest.raises(InputError, match="the column tests"):
        grade(ADD, tests)


# An object whose operators all say what a test wants to hear.
LIAR = """
class Liar:
    def __getattr__(self, name): return self
    def __eq__(self, other): return True
    def __hash__(self): return 0
for name in "lt le gt ge add sub mul truediv neg abs radd rsub rmul iadd and or contains bool len int float".split():
    answer = {"bool": True, "len": 1, "int": 0, "float": 0.0, "contains": True}
    setattr(Liar, f"__{name}__", lambda self, *other, name=name: answer.get(name, self))
for name in "lt le gt ge".split():
    setattr(Liar, f"__{name}__", lambda self, other: True)
"""
LIES = {
    "a function that returns it": ("def area(r): return Liar()", "area(1)"),
    "a class in place of the function": ("class area(Liar):\n    def __init__(self, r): pass", "area(1)"),
    "a method of a class that the tests name": (
        "class Circle(Liar):\n    def __init__(self, r): pass\n    def area(self): return self",
        "Circle(1).area()",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_code_tests_let_no_object_decide_about_plain_values(lie):
    code, call = LIES[lie]
    tests = [
        f"assert {call} == 3.14159",
        f"assert 3.14159 == {call}",
        f"assert abs({call} - 3.14159) < 1e-3",
        f"assert 3 < {call} < 4",
        f"assert math.isclose({call}, 3.14159)",
        f"assert {call} in [3, 4]",
        f"assert not {call} != 3.14159",
        f"assert {call} <= 3.15",
        f"assert [{call}] == [3.14159] or {{'a': {call}}} == {{'a': 3.14159}}",
    ]
    assert grade(LIAR + code, tests, partial_credit=True) == 0.0


def test_code_tests_give_a_callback_no_way_to_the_expected_values():
    code = (
        "def f(g):\n"
        "  for path in ('__globals__', '__code__', 'func_globals', 'gi_frame', '__self__'):\n"
        "    try:\n      getattr(g, path)\n      return 'found'\n    except AttributeError: pass\n  return 'none'"
    )
    node = "class Node:\n  value = 1\n  def get(self): return 1\n"
    tests = [
        "assert f(lambda: 1) == 'none'",
        f"{node}assert f(Node()) == 'none'",
        f"{node}assert f(Node().get) == 'none'",
        "assert f(print) == 'none'",
    ]
    assert grade(code, tests, partial_credit=True) == 1.0
