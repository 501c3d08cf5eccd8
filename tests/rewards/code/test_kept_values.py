"""code_tests: lists and such that the code keeps, its own and those of the tests; further right and wrong code."""

# ruff: noqa: E501
# A program in a table is read as one line.

import pytest

from rekatrain.data.chat import parse_completion, render_completion
from rekatrain.rewards.code.code_tests import CodeTests
from rekatrain.rewards.code.sandbox import _problem
from tests.rewards.code import further_code

pytestmark = pytest.mark.skipif(bool(_problem("namespaces")), reason=_problem("namespaces"))
LOG = "class Log:\n  def __init__(self, out): self.out = out\n  def add(self, x):\n    self.out.append(x)\n    return len(self.out)"
REGISTER = "kept = []\ndef keep(x): kept.append(x)\ndef run():\n  for x in kept: x['n'] = x.get('n', 0) + 1"
TOTAL = "kept = []\ndef keep(x): kept.append(x)\ndef total(): return sum(map(sum, kept))"
STORE = "class Store:\n  def __init__(self): self.items = []\n  def add(self, x):\n    self.items.append(x)\n    return self.items"
SEEN = "seen = []\ndef f(a):\n  if any(a is b for b in seen): return True\n  seen.append(a)\n  return False"
# Code, and a statement about it that holds.
KEPT = {
    "own list, as returned": ("a = []\ndef f(x):\n  a.append(x)\n  return a", "x, y = f(1), f(2)\nassert (x, y) == ([1], [1, 2])"),
    "own dict, as returned": ("d = {}\ndef f(k):\n  d[k] = 1\n  return d", "x = f('a')\nf('b')\nassert x == {'a': 1}"),
    "attribute, as returned": (STORE, "s = Store()\nx = s.add(1)\ns.add(2)\nassert x == [1] and s.items == [1, 2]"),
    "attribute, then changed": (STORE, "s = Store()\nx = s.items\ns.add(1)\nx.append(2)\nassert s.items == x == [1, 2]"),
    "list of the tests": (LOG, "out = []\nlog = Log(out)\nlog.add(1)\nlog.add(2)\nassert out == [1, 2]"),
    "dicts of the tests": (REGISTER, "a, b = {}, {}\nkeep(a)\nkeep(b)\nrun()\nrun()\nassert a == b == {'n': 2}"),
    "changed by the tests": (TOTAL, "a = [1]\nkeep(a)\na.append(5)\nassert total() == 6"),
    "changed by both": (LOG, "out = []\nlog = Log(out)\nlog.add(1)\nout.append(2)\nassert log.add(3) == 3 and out == [1, 2, 3]"),
    "returned to the tests": (LOG, "out = [1]\nlog = Log(out)\nassert log.out is out"),
    "passed twice": (SEEN, "a = [1]\nassert not f(a)\nassert f(a)\nassert not f([1])"),
    "derived argument": ("class S(list): pass\ndef f(s, x): x.append(len(s))", "s, x = S([1, 2]), []\nf(s, x)\nassert x == [2]"),
}  # fmt: skip


def grade(code: str, tests: object) -> float | None:
    scorer = CodeTests(time_limit=20.0, memory_limit_mb=2048)
    return scorer(parse_completion(render_completion("Hm.", f"```python\n{code}\n```")), tests=tests)


@pytest.mark.parametrize("kind", KEPT)
def test_kept_value_is_judged_right(kind: str) -> None:
    code, test = KEPT[kind]
    assert grade(code, [test]) == 1.0


def test_kept_value_that_is_wrong_fails() -> None:
    test = KEPT["list of the tests"][1]
    assert grade(LOG.replace("append(x)", "append(0)"), [test]) == 0.0
    assert grade(LOG.replace("= out", "= list(out)"), [test]) == 0.0


@pytest.mark.parametrize("kind", further_code.RIGHT)
def test_further_right_code_passes(kind: str) -> None:
    code, tests = further_code.RIGHT[kind]
    assert grade(code, tests) == 1.0


@pytest.mark.parametrize("kind", further_code.WRONG)
def test_further_wrong_code_fails(kind: str) -> None:
    code, tests = further_code.WRONG[kind]
    assert grade(code, tests) == 0.0
