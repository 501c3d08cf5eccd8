"""A row whose columns a reward cannot read is a bad row at loading, not an end in mid-run."""

import logging

import pytest

from rekatrain.data.errors import InputError
from rekatrain.data.rows import Row, Source
from rekatrain.rewards.code.sandbox import _problem
from rekatrain.rewards.compose import build_reward_functions
from rekatrain.rewards.gradable import keep_gradable

pytestmark = pytest.mark.skipif(bool(_problem("namespaces")), reason=_problem("namespaces"))

TESTS = [["assert add(1, 2) == 3"], {"inputs": ["1"], "outputs": []}, None, [{"input": "1"}]]


def rows(source: Source) -> list[Row]:
    return [
        Row(messages=[], columns={"tests": tests}, source=source, where=f"train.jsonl:{number}")
        for number, tests in enumerate(TESTS, 1)
    ]


def test_keep_gradable_rejects_or_skips_a_malformed_row(caplog: pytest.LogCaptureFixture) -> None:
    functions = build_reward_functions({"code_tests": None, "math_answer": None})
    with pytest.raises(
        InputError, match=r"train.jsonl:2: the column tests must hold as many outputs as inputs.*bad_rows"
    ):
        keep_gradable(functions, rows(Source()))
    with caplog.at_level(logging.WARNING):
        assert keep_gradable(functions, rows(Source(bad_rows="skip"))) == [True, False, True, False]
    assert "train.jsonl:4 is skipped: the column tests must hold objects with input and output" in caplog.text
    assert keep_gradable(functions, rows(Source(rewards=("math_answer",)))) == [True] * 4  # judged by others only
    with pytest.raises(InputError, match="no row is left"):
        keep_gradable(functions, rows(Source(bad_rows="skip"))[1:2])
