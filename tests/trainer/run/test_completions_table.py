"""The table of completions: 80 columns of plain text, whatever a policy writes."""

import unicodedata
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

from rekatrain.trainer.run.completions_table import choose_group, choose_rows, completions_table


def record(text: str, reward: float | None = 1.0, prompt: int = 0, **others: Any) -> dict[str, Any]:
    base = {"prompt_index": prompt, "prompt": f"human: {prompt} + 1? <sep> assistant:", "completion": text}
    base |= {"completion_ids": [1, 2], "finish_reason": "stop", "reward": reward, "advantage": 0.5, "reward_errors": {}}
    return {**base, "rewards": {"math_answer": reward}, "gold": "7", **others}


def test_completions_table_shows_prompt_gold_rewards_and_text() -> None:
    table = completions_table(
        [record(" <reasoning>\nhm\n</reasoning>\n\n7 <sep>"), record("8", 0.25)], title="step 3/9"
    )
    assert table.startswith("step 3/9\n  human: 0 + 1?\n  gold: 7\n+---")
    for text in ("<reasoning> / hm / </reasoning> / 7 <sep>", "math_answer 0.25", "advantage +0.5", "stop, 2 tokens"):
        assert text in table, text
    assert max(map(len, table.splitlines())) <= 80


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=400), min_size=1, max_size=5), st.text(max_size=200))
def test_completions_table_is_plain_text_of_80_columns(texts: list[str], prompt: str) -> None:
    for lines in (4, None):
        table = completions_table([record(text, prompt_text=prompt) for text in texts], title="x", num_lines=lines)
        assert all(character == "\n" or unicodedata.category(character) != "Cc" for character in table)
        assert max(map(cell_len, table.splitlines()[3:])) <= 80


def test_completions_table_has_no_terminal_codes_and_no_markup() -> None:
    table = completions_table(
        [record("\x1b[2J\x9b31m [bold]7[/bold] \x07", rewards={"\x1b]0;x": 1.0})], title="\x1b[0m"
    )
    assert "\x1b" not in table and "\x9b" not in table and "\x07" not in table and "[bold]7[/bold]" in table


def test_choose_group_prefers_rewards_that_differ_and_rows_their_range() -> None:
    step = [record(str(n), 1.0, 0) for n in range(4)] + [record(str(n), n / 8, 1) for n in range(9)]
    group = choose_group(step)
    assert {r["prompt_index"] for r in group} == {1} and choose_group(step[:4]) == step[:4]
    assert [r["reward"] for r in choose_rows(group, 3)] == [1.0, 0.5, 0.0]
    assert [r["reward"] for r in choose_rows([record("a", None), record("b", 0.0)], 4)] == [0.0, None]


def test_completions_table_cuts_long_texts_in_the_middle() -> None:
    table = completions_table([record("begin " + "x " * 5000 + "end")], title="x")
    assert len(table.splitlines()) < 15 and "begin" in table and "end" in table
    assert len(completions_table([record("x " * 5000)], title="x", num_lines=None)) > 10_000


@pytest.mark.parametrize("missing", ["reward", "advantage", "gold"])
def test_completions_table_has_a_dash_for_what_is_unknown(missing: str) -> None:
    assert completions_table([record("7", **{missing: None} if missing != "reward" else {}, reward=None)], title="x")
