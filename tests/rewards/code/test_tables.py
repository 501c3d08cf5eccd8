"""code_tests: arrays of numpy and tables of pandas as arguments and results, also in lists, dicts and objects."""

import importlib.util
from typing import Any

import pytest

from rekatrain.data.chat import parse_completion, render_completion
from rekatrain.rewards.code.code_tests import CodeTests
from rekatrain.rewards.code.sandbox import _problem
from rekatrain.rewards.errors import RewardError

pytest.importorskip("pandas")
pytestmark = pytest.mark.skipif(bool(_problem("namespaces")), reason=_problem("namespaces"))
IMPORTS = "import numpy as np\nimport pandas as pd\n"
VALUES = [
    "pd.Series([1, None])",
    "pd.Series(['a', None], name='n')",
    "pd.Series([1, None], dtype='Int64')",
    "pd.Series([True, None], dtype='boolean')",
    "pd.Series(['a', 'b'], dtype='string')",
    "pd.Series(['a', 'b'], dtype='category')",
    "pd.Series(pd.date_range('2024-01-01', periods=3, tz='Europe/Berlin'))",
    "pd.Series(pd.to_timedelta([1, 2], unit='h'))",
    "pd.Series(pd.period_range('2024-01', periods=2, freq='M'))",
    "pd.Series([[1], {'a': 2}, (3,)])",
    "pd.cut(pd.Series([1, 2, 3]), 2)",
    "pd.DataFrame()",
    "pd.DataFrame(columns=['a', 'b'])",
    "pd.DataFrame([[1, 'x'], [3, 'y']], columns=['a', 'a'])",
    "pd.DataFrame({'a': [1.5]}, index=pd.MultiIndex.from_tuples([('x', 1)], names=['p', 'q']))",
    "pd.pivot_table(pd.DataFrame({'a': [1, 1], 'b': [1, 2], 'c': [3, 4]}), index='a', columns='b', values=['c'])",
    "pd.Index(['a', 'b'], name='n')",
    "pd.RangeIndex(3)",
    "pd.date_range('2024', periods=3, freq='MS', tz='UTC')",
    "pd.MultiIndex.from_product([[1, 2], ['a']])",
    "np.array([[1.0, np.nan]])",
    "np.array(['a', None, [1]], dtype=object)",
    "np.array(['2024-01-01'], dtype='M8[D]')",
    "{'a': [np.eye(2)], 'b': (pd.Series([1]), pd.DataFrame({'c': [2]}))}",
    "pd.Timestamp('2024-01-01 10:00:00.123456789', tz='UTC')",
    "pd.Interval(0, 1)",
]
# Code, and a statement about it that holds.
FUNCTIONS = {
    "rows": ("def f(d): return d[d.a > 1]", "assert f(pd.DataFrame({'a': [1, 2]}))['a'].tolist() == [2]"),
    "frames": (
        "def f(d): return d.T",
        "pd.testing.assert_frame_equal(f(pd.DataFrame({'a': [1, 2]})), pd.DataFrame({0: [1], 1: [2]}, index=['a']))",
    ),
    "groups": (
        "def f(d): return d.groupby('k')['v'].sum()",
        "assert f(pd.DataFrame({'k': list('aab'), 'v': [1, 2, 3]})) == pd.Series([3, 3], index=['a', 'b'])",
    ),
    "in place": (
        "def f(d):\n  d['b'] = d.a * 2\n  d.drop(columns='a', inplace=True)",
        "d = pd.DataFrame({'a': [1, 2]})\nalias = [d]\nf(d)\nassert alias[0].to_dict('list') == {'b': [2, 4]}",
    ),
    "array in a list": ("def f(x): x[0][0] = 9", "a = np.array([1, 2])\nf([a])\nassert a.tolist() == [9, 2]"),
    "function": ("def f(d, g): return d.a.apply(g)", "assert f(pd.DataFrame({'a': [1]}), lambda x: x + 1)[0] == 2"),
    "object": (
        "class Store:\n  def __init__(self): self.d = pd.DataFrame({'a': []})\n"
        "  def add(self, x): self.d.loc[len(self.d)] = [x]",
        "s = Store()\ns.add(1.0)\nassert len(s.d) == 1 and s.d == pd.DataFrame({'a': [1.0]})",
    ),
    "not equal": ("def f(x): return x", "assert f(pd.Series([1, 2])) != pd.Series([1, 3])"),
    "other labels": ("def f(x): return x", "assert not f(pd.DataFrame({'a': [1]})) == pd.DataFrame({'b': [1]})"),
    "other shape": ("def f(x): return x", "assert f([np.array([1, 2])]) != [np.array([1, 2, 3])]"),
}


def grade(code: str, tests: Any) -> float | None:
    scorer = CodeTests(time_limit=20.0, memory_limit_mb=2048, partial_credit=True)
    return scorer(parse_completion(render_completion("Hm.", f"```python\n{IMPORTS}{code}\n```")), tests=tests)


def test_tables_arrive_and_return_as_they_are() -> None:
    equal = [f"{IMPORTS}x = {value}\nassert f(x) == x and type(f(x)) is type(x)" for value in VALUES]
    assert grade("def f(x): return x", equal) == 1.0
    assert grade("def f(x): return [x]", equal) == 0.0


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_function_of_tables_passes(kind: str) -> None:
    code, test = FUNCTIONS[kind]
    assert grade(code, [f"{IMPORTS}{test}"]) == 1.0
    assert grade("unrelated = 1", [f"{IMPORTS}{test}"]) == 0.0


def test_tables_with_other_values_fail() -> None:
    tests = [
        f"{IMPORTS}assert f(pd.DataFrame({{'a': [1, 2]}})) == pd.DataFrame({{'a': [1, 3]}})",
        f"{IMPORTS}assert f(np.array([1, 2])) == np.array([1, 3])",
        f"{IMPORTS}assert f([pd.Series([1])]) == [pd.Series([2])]",
        f"{IMPORTS}assert f(np.array([1, 2])) == [1, 2]",
    ]
    assert grade("def f(x): return x", tests) == 0.0


def test_calls_accept_arrays_for_lists() -> None:
    tests = {"inputs": [[[1, 2]]], "outputs": [[2, 4]], "fn_name": "f"}
    assert grade("def f(x): return np.array(x) * 2", tests) == 1.0
    assert grade("def f(x): return pd.Series(x) * 2", tests) == 1.0
    assert grade("def f(x): return np.array(x)", tests) == 0.0


def test_missing_package_is_an_error_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pandas" else find_spec(name))
    with pytest.raises(RewardError, match="the code imports pandas, which is not installed"):
        grade("def f(x): return x", ["assert f(1) == 1"])
    for test in ("import no_such\nassert f(1)", "f(1)\nimport no_such"):
        with pytest.raises(RewardError, match="needs a module: No module named 'no_such'"):
            scorer = CodeTests(time_limit=20.0)
            scorer(parse_completion(render_completion("Hm.", "def f(x): return x")), tests=[test])
