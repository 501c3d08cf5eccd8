"""Rewards that judge some of the completions: the others get None, and no call."""

from pathlib import Path

import pytest

from rekatrain.data.errors import InputError
from rekatrain.data.rows import Source
from rekatrain.rewards.compose import build_reward_functions
from rekatrain.rewards.gradable import check_source_columns
from rekatrain.rewards.grader import Grader
from rekatrain.rewards.scoring import ScoringConfig

MODULE = """
def gold(completion, *, gold):
    return float(completion.answer == gold)

def length(completions, gold, **kwargs):
    assert all(gold), gold
    return [float(len(text)) for text in completions]

def plain(completions, **kwargs):
    return [1.0 for _ in completions]
"""


def test_rewards_score_only_what_they_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "judging_rewards.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    names = [f"judging_rewards:{name}" for name in ("gold", "length", "plain")]
    functions = build_reward_functions(dict.fromkeys(names))
    judges = [names[:2], names[2:], None, names[2:]]
    with Grader(functions, ScoringConfig(num_workers=1)) as grader:
        scores = grader.score(
            prompts=["a"] * 4,
            completions=["x", "yy", "z", "yy"],
            completion_ids=[[1]] * 4,
            columns={"gold": ["x", None, "x", None]},
            judges=judges,
        )
        assert scores.by_name == {
            names[0]: [1.0, None, 0.0, None],
            names[1]: [1.0, None, 1.0, None],
            names[2]: [None, 1.0, 1.0, 1.0],
        }
        assert scores.total == [2.0, 1.0, 2.0, 1.0] and not any(scores.errors)
        # No completion is judged by the rewards that need a column, and the rows have none.
        scores = grader.score(prompts=["a"], completions=["x"], completion_ids=[[1]], columns={}, judges=[names[2:]])
        assert scores.total == [1.0]


def test_rewards_need_their_columns_where_they_judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "judging_rewards.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    functions = build_reward_functions({"judging_rewards:gold": None})
    with_gold = Source(name="a", columns={"gold"}, rewards=("judging_rewards:gold",))
    without = Source(name="b", columns={"answer"}, rewards=("other",))
    check_source_columns(functions, [with_gold, without])
    with pytest.raises(InputError, match=r"needs the column gold, which the rows do not have \(columns: answer\)"):
        check_source_columns(functions, [Source(columns={"answer"})])
    with pytest.raises(InputError, match="reward judging_rewards:gold judges no source"):
        check_source_columns(functions, [without])
