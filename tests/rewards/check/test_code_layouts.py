"""check-rewards: the reference solutions of each published layout of code earn full marks, as their files have them."""

import json
from pathlib import Path
from typing import Any

import pytest

from rekatrain.data.sources import load_rows
from rekatrain.rewards.check.check import check_golds
from rekatrain.rewards.code.sandbox import _problem
from rekatrain.rewards.compose import build_reward_functions
from rekatrain.rewards.scoring import ScoringConfig

pytestmark = pytest.mark.skipif(bool(_problem("namespaces")), reason=_problem("namespaces"))

TASK = "Add two numbers."
PROGRAM = "a, b = map(int, input().split())\nprint(a + b)\n"
ADD = "def add(a, b):\n    return a + b\n"
METHOD = "class Solution:\n    def add(self, a: int, b: int) -> int:\n        return a + b\n"
PAIRS = {"inputs": ["1 2\n", "5 6\n"], "outputs": ["3\n", "11\n"]}
# A row of each data set, and the keys of `dataset:` that read it.
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "apps": (
        {"question": TASK, "input_output": json.dumps(PAIRS), "solutions": json.dumps([PROGRAM, "print(0)"])},
        {"columns": {"prompt": "question", "tests": "input_output"}},
    ),
    "apps, a function": (
        {
            "question": TASK,
            "input_output": json.dumps({"fn_name": "add", "inputs": [[1, 2]], "outputs": [[3]]}),
            "solutions": json.dumps([ADD]),
        },
        {"columns": {"prompt": "question", "tests": "input_output"}},
    ),
    "taco": (
        {"question": TASK, "input_output": json.dumps(PAIRS), "solutions": json.dumps([PROGRAM])},
        {"columns": {"prompt": "question", "tests": "input_output"}},
    ),
    "code_contests": (
        {
            "description": TASK,
            "public_tests": {"input": ["1 2\n"], "output": ["3\n"]},
            "solutions": {"language": [2, 3], "solution": ["int main() {}", PROGRAM]},
        },
        {"columns": {"prompt": "description", "tests": "public_tests"}},
    ),
    "KodCode": (
        {
            "question": TASK,
            "test": "from solution import add\n\ndef test_add():\n    assert add(1, 2) == 3\n",
            "solution": ADD,
        },
        {"columns": {"prompt": "question", "tests": "test"}},
    ),
    "SYNTHETIC-1": (
        {
            "prompt": TASK,
            "verification_info": json.dumps(
                {"language": "python", "test_cases": [{"type": "stdin_stdout", "input": "1 2\n", "output": "3\n"}]}
            ),
            "gold_standard_solution": f"```python\n{PROGRAM}```",
        },
        {"columns": {"tests": "verification_info"}},
    ),
    "LiveCodeBench": (
        {
            "question_content": TASK,
            "public_test_cases": json.dumps([{"input": "1 2", "output": "3", "testtype": "stdin"}]),
            "code": PROGRAM,
        },
        {"columns": {"prompt": "question_content", "tests": "public_test_cases"}},
    ),
    "LiveCodeBench, functional": (
        {
            "prompt": TASK,
            "tests": {
                "public_test_cases": json.dumps([{"input": "1\n2", "output": "3", "testtype": "functional"}]),
                "metadata": json.dumps({"func_name": "add"}),
            },
            "code": METHOD,
        },
        {},
    ),
    "EvalPlus": (
        {
            "task_id": "HumanEval/0",
            "prompt": 'def add(a, b):\n    """Add."""\n',
            "canonical_solution": "    return a + b\n",
            "test": "def check(candidate):\n    assert candidate(1, 2) == 3\n",
            "entry_point": "add",
        },
        {"format": "humaneval"},
    ),
    "MBPP+": (
        {
            "prompt": TASK,
            "code": ADD,
            "test": "inputs, results = [[1, 2]], [3]\nfor i, r in zip(inputs, results):\n    assert add(*i) == r\n",
        },
        {"columns": {"tests": "test"}},
    ),
    "LeetCodeDataset": (
        {
            "query": TASK,
            "tests": {
                "test": "def check(candidate):\n    assert candidate(a = 1, b = 2) == 3\n",
                "entry_point": "Solution().add",
                "prompt": "from typing import *\nimport math\n",
            },
            "completion": METHOD,
        },
        {"columns": {"prompt": "query"}},
    ),
    "open-r1/codeforces": (
        {"prompt": TASK, "official_tests": [{"input": "1 2", "output": "3"}], "solution": PROGRAM},
        {"columns": {"tests": "official_tests"}},
    ),
    "DeepCoder": (
        {
            "problem": TASK,
            "tests": json.dumps([{"type": "stdin_stdout", "input": "1 2\n", "output": "3\n", "fn_name": None}]),
            "solutions": [PROGRAM],
        },
        {"columns": {"prompt": "problem"}},
    ),
}


def test_golds_of_all_code_layouts_earn_full_marks(tmp_path: Path) -> None:
    rows = []
    for number, (name, (row, keys)) in enumerate(LAYOUTS.items()):
        path = tmp_path / f"{number}.jsonl"
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")
        rows += load_rows(**{"path": str(path), "format": "prompt_answer", "source": name, **keys}).rows
    functions = build_reward_functions({"code_tests": {"time_limit": 20.0}})
    check = check_golds(functions, rows, ScoringConfig(num_workers=1), num_wrong=1)
    assert {table.source: table.values for table in check.golds} == {name: [1.0] for name in LAYOUTS}
    wrong = [table for table in check.wrong if table.mutation == "truncated"]
    assert wrong and not any(table.num_passed for table in wrong)
