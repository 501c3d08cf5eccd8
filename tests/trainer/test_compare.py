"""The paired comparison of two evaluations, against scipy and by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rekatrain.data.errors import InputError
from rekatrain.trainer.cli import main
from rekatrain.trainer.compare import compare_answers, mcnemar_exact, paired_difference


def answer(prompt: str, *values: float | None, name: str = "math") -> list[dict[str, Any]]:
    """Return the answers to one prompt by their rewards."""
    return [
        {"prompt": prompt, "row": f"row {prompt}", "completion": f"{value} to {prompt}", "rewards": {name: value}}
        for value in values
    ]


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_exact_equals_scipys_binomial_test(only_a: int, only_b: int) -> None:
    expected = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert mcnemar_exact(only_a, only_b) == pytest.approx(expected, rel=1e-9)


def test_paired_difference_is_near_scipys_bootstrap_and_t_interval() -> None:
    generator = np.random.default_rng(5)
    first = generator.random(300)
    second = first + generator.normal(0.05, 0.2, 300)
    found = paired_difference(list(zip(first.tolist(), second.tolist(), strict=True)))
    differences = second - first
    assert found.difference == pytest.approx(differences.mean()) and found.mean_b == pytest.approx(second.mean())
    by_scipy = stats.bootstrap((differences,), np.mean, method="percentile", n_resamples=10_000, rng=1)
    by_t = stats.t.interval(0.95, 299, loc=differences.mean(), scale=stats.sem(differences))
    for expected in (tuple(by_scipy.confidence_interval), by_t):
        assert (found.low, found.high) == pytest.approx(expected, abs=0.0015)


def test_pairing_is_narrower_than_two_separate_intervals() -> None:
    generator = np.random.default_rng(0)
    difficulty = generator.random(200)
    pairs = [(float(value > 0.5), float(value > 0.45)) for value in difficulty]
    found = paired_difference(pairs)
    assert found.low > 0 and found.high - found.low < 0.1


def test_compare_answers_counts_pairs_by_hand() -> None:
    in_a = {"p": (1.0, 0.0), "q": (0.0,), "r": (1.0,), "s": (None,), "t": (0.0,)}
    in_b = {"q": (1.0,), "p": (1.0, 1.0), "r": (0.0,), "s": (1.0,), "u": (1.0,)}
    a, b = ({key: answer(key, *values) for key, values in side.items()} for side in (in_a, in_b))
    found = compare_answers(a, b, reward="math")
    assert (found.only_a, found.only_b, found.p_value, found.num_unpaired) == (1, 1, 1.0, 3)
    assert found.accuracy.num_prompts == 3 and found.accuracy.difference == 0
    # Over all answers: p 0.5 -> 1, q 0 -> 1, r 1 -> 0.
    assert found.rewards["math"].difference == pytest.approx((0.5 + 1 - 1) / 3)
    assert [(row["prompt"], row["direction"]) for row in found.changed] == [
        ("q", "right in B alone"),
        ("r", "right in A alone"),
    ]
    graded = compare_answers({"p": answer("p", 0.25)}, {"p": answer("p", 0.75)}, reward="math")
    assert graded.p_value is None and graded.rewards["math"].difference == 0.5


def test_compare_answers_rejects_what_has_no_pair() -> None:
    with pytest.raises(InputError, match="no prompt in common"):
        compare_answers({"p": answer("p", 1.0)}, {"q": answer("q", 1.0)}, reward="math")
    with pytest.raises(InputError, match="evaluation B has no reward 'math'"):
        compare_answers({"p": answer("p", 1.0)}, {"p": answer("p", 1.0, name="other")}, reward="math")
    with pytest.raises(InputError, match="no prompt has a first answer that math grades"):
        compare_answers({"p": answer("p", None)}, {"p": answer("p", 1.0)}, reward="math")


def test_compare_command_prints_the_difference_and_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, values in (("a", [0.0] * 8 + [1.0] * 4), ("b", [1.0] * 7 + [0.0] + [1.0] * 4)):
        answers = [each for number, value in enumerate(values) for each in answer(f"{number} + 1?", value)]
        answers += answer("the same", 1.0) + [{**answer("the same", 0.0)[0], "row": "another row"}]
        (tmp_path / f"{name}.json").write_text(json.dumps({"evaluate": {"reward": "math"}, "answers": answers}))
    main(["compare", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--out", str(tmp_path / "out.json")])
    output = capsys.readouterr().out
    assert "14 prompts in both" in output and "math: 35.7% -> 85.7%, difference +50.0 [" in output
    assert "right in B alone 7, right in A alone 0; McNemar's exact test: p = 0.0156" in output
    assert "row 3 + 1?: 3 + 1?" in output
    result = json.loads((tmp_path / "out.json").read_text())
    assert len(result["changed"]) == 7 and result["only_b"] == 7
    with pytest.raises(SystemExit) as caught:
        main(["compare", str(tmp_path / "a.json"), str(tmp_path / "none.json")])
    assert caught.value.code == 2 and "no file at" in capsys.readouterr().err
