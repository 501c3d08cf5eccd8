"""code_tests: rows of PRIME's Eurus-2-RL-Data, with the tests in `reward_model.ground_truth` or in `answer`."""

import json
from pathlib import Path
from typing import Any

import pytest

from rekatrain.data.sources import load_rows
from rekatrain.rewards.check.check import check_golds
from rekatrain.rewards.code.sandbox import _problem
from rekatrain.rewards.compose import build_reward_functions
from rekatrain.rewards.scoring import ScoringConfig

SYSTEM = {"role": "system", "content": "When tackling complex reasoning tasks, think first."}
PROGRAM = "import sys\nfor line in sys.stdin:\n    a, b = map(int, line.split())\n    print(a + b)\n"
ROWS: list[tuple[dict[str, Any], str]] = [  # the tests, and a right solution
    ({"inputs": ["1 2\n", "5 6\n7 8\n"], "outputs": ["3\n", "11\n15\n"]}, PROGRAM),
    (
        {"fn_name": "repeat", "inputs": [["ab", 2], ["", 3]], "outputs": [["abab"], [""]]},
        "def repeat(text, count):\n    return text * count\n",
    ),
    (
        {"fn_name": "pairs", "inputs": [[[3, 1, 2]], [[]]], "outputs": [[[[1, 2], [2, 3]]], [[]]]},
        "class Solution:\n    def pairs(self, xs: list[int]) -> list:\n"
        "        xs = sorted(xs)\n        return [list(pair) for pair in zip(xs, xs[1:])]\n",
    ),
]


def prime_row(tests: Any, **more: Any) -> dict[str, Any]:
    truth = tests if isinstance(tests, str) else json.dumps(tests)
    return {
        "data_source": "taco",
        "prompt": [SYSTEM, {"role": "user", "content": "Solve it. Write Python code."}],
        "ability": "code",
        "reward_model": {"ground_truth": truth, "style": "rule"},
        "extra_info": {"index": 0, "split": "dummy"},
        **more,
    }


def older_row(tests: Any, **more: Any) -> dict[str, Any]:
    row = prime_row(tests, **more)
    return {**{key: row[key] for key in row if key != "reward_model"}, "answer": row["reward_model"]["ground_truth"]}


FORMS = {"verl": prime_row, "prompt_answer": older_row}


def load(tmp_path: Path, form: str, rows: list[dict[str, Any]], **keys: Any) -> Any:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_rows(path=str(path), format=form, **keys)


@pytest.mark.skipif(bool(_problem("namespaces")), reason=_problem("namespaces"))
@pytest.mark.parametrize("form", FORMS)
def test_prime_golds_earn_full_marks(tmp_path: Path, form: str) -> None:
    rows = load(tmp_path, form, [FORMS[form](tests, solution=code) for tests, code in ROWS], source="prime").rows
    assert [row.columns["tests"] for row in rows] == [tests for tests, _ in ROWS]
    functions = build_reward_functions({"code_tests": {"time_limit": 20.0}})
    check = check_golds(functions, rows, ScoringConfig(num_workers=1), num_wrong=3)
    assert [table.values for table in check.golds] == [[1.0] * 3]
    wrong = [table for table in check.wrong if table.mutation == "another row's gold"]
    assert wrong and not any(table.num_passed for table in wrong)


@pytest.mark.parametrize("form", FORMS)
def test_prime_math_beside_code_has_no_tests(tmp_path: Path, form: str) -> None:
    rows = [FORMS[form](ROWS[0][0]), FORMS[form]("5", ability="math", data_source="numina_olympiads")]
    code, math = load(tmp_path, form, rows).rows
    assert (code.columns["answer"], math.columns["answer"]) == (None, "5")
    assert (code.columns["tests"], math.columns["tests"]) == (ROWS[0][0], None)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "tests",
    [
        "no JSON",
        '{"inputs": ["1"], "outputs": ["1"]',
        {"inputs": ["1"], "outputs": []},
        {"inputs": [], "outputs": []},
        {"inputs": "1", "outputs": "1"},
        {"inputs": ["1"]},
        "[]",
    ],
)
def test_prime_malformed_row_is_a_bad_row(tmp_path: Path, form: str, tests: Any) -> None:
    rows = [FORMS[form](ROWS[0][0]), FORMS[form](tests)]
    loaded = load(tmp_path, form, rows, bad_rows="skip")
    assert len(loaded.rows) == 1
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: .*tests"):
        load(tmp_path, form, rows)
