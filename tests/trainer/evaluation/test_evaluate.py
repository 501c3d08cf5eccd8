"""Accuracy with its interval, pass@k, and the evaluation of a model."""

import itertools
import json
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rekatrain.data.errors import InputError
from rekatrain.trainer.evaluate import evaluate
from rekatrain.trainer.held_out_prompts import EvaluateConfig
from rekatrain.trainer.intervals import pass_at_k, pass_rates, wilson_interval
from rekatrain.trainer.recipe.load import load_recipe


@pytest.mark.parametrize(
    ("answers", "right", "k", "value"), [(8, 3, 4, 0.928571), (4, 1, 2, 0.5), (3, 0, 3, 0), (3, 1, 3, 1)]
)
def test_pass_at_k_equals_values_by_hand(answers: int, right: int, k: int, value: float) -> None:
    assert pass_at_k(answers, right, k) == pytest.approx(value, abs=5e-7)


@given(st.integers(1, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n))))
def test_pass_at_k_is_the_fraction_of_draws_with_a_right_one(case: tuple[int, int, int]) -> None:
    num_answers, num_right, k = case
    draws = list(itertools.combinations([True] * num_right + [False] * (num_answers - num_right), k))
    assert pass_at_k(*case) == pytest.approx(float(Fraction(sum(map(any, draws)), len(draws))), abs=1e-12)


def test_pass_at_k_has_the_expectation_of_k_fresh_answers() -> None:
    chance, num_answers, k = Fraction(3, 10), 6, 4
    expected = sum(
        chance ** sum(rights) * (1 - chance) ** (num_answers - sum(rights)) * Fraction(pass_at_k(6, sum(rights), k))
        for rights in itertools.product([0, 1], repeat=num_answers)
    )
    assert float(expected) == pytest.approx(1 - 0.7**k, abs=1e-12)


def test_pass_rates_average_prompts_with_enough_answers() -> None:
    scores = [[1.0, 0.0, 0.5], [None, 1.0, None], [0.0, 0.0, None]]
    assert pass_rates(scores) == pytest.approx({1: (1 / 3 + 1 + 0) / 3, 2: (2 / 3 + 0) / 2, 3: 1.0})


def test_wilson_interval_solves_its_equation() -> None:
    # Both ends solve (fraction - p)^2 = z^2 p (1 - p) / n.
    interval = wilson_interval(num_right=3, num_graded=20)
    for end in (interval.low, interval.high):
        assert (0.15 - end) ** 2 == pytest.approx(1.959963984540054**2 * end * (1 - end) / 20, abs=1e-12)


def test_evaluate_config_rejects_answers_at_temperature_zero() -> None:
    with pytest.raises(InputError, match="num_generations 4 at temperature 0"):
        EvaluateConfig(num_generations=4)


def test_evaluate_writes_all_answers_to_a_prompt(model_folder: Path, tmp_path: Path, capsys) -> None:
    rows = [{"messages": [{"role": "user", "content": text}]} for text in ("Count a", "Count b", "Count c", "Another")]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    other = tmp_path / "train.jsonl"
    other.write_text(json.dumps(rows[3]))
    (tmp_path / "recipe.yaml").write_text(
        f"""stage: rloo
output_dir: {tmp_path}/run
model: {{pretrained_model_name_or_path: {model_folder}, dtype: float32}}
dataset: {{path: {other}}}
eval_dataset: {{path: {data}}}
rewards: {{regex: {{pattern: "[a-m]"}}}}
evaluate: {{reward: regex, max_completion_length: 4, temperature: 1.0, num_generations: 4}}
rloo: {{max_steps: 1}}
"""
    )
    accuracy = evaluate(load_recipe(tmp_path / "recipe.yaml"), out=tmp_path / "out.json")
    result = json.loads((tmp_path / "out.json").read_text())
    values = [answer["rewards"]["regex"] for answer in result["answers"]]
    assert len(values) == 12 and len({answer["completion"] for answer in result["answers"]}) > 3
    groups = [values[first : first + 4] for first in range(0, 12, 4)]
    assert accuracy.num_right == sum(group[0] for group in groups)
    assert result["pass_at"] == {str(k): rate for k, rate in pass_rates(groups).items()}
    assert list(result["pass_at"]) == ["1", "2", "4"]
    assert f"pass@4 {result['pass_at']['4']:.1%}" in capsys.readouterr().out
