"""The measurements of a reward model on pairs of scores."""

import math

import pytest

from rekatrain.trainer.reward_model.evaluate_pairs import calibration_bins, summarize_scores


def test_summarize_scores_by_hand() -> None:
    evaluation = summarize_scores([2.0, 1.0, 0.0, 5.0], [0.0, 2.0, 0.0, 4.0], [3, 3, 3, 9], [2, 3, 5, 9])
    assert (evaluation.accuracy.num_right, evaluation.accuracy.num_graded) == (2, 4)  # the tie counts as wrong
    assert evaluation.longer_wins == (1 + 0.5 + 0 + 0.5) / 4
    assert (evaluation.mean, evaluation.std) == pytest.approx((1.75, math.sqrt(25.5 / 8)))
    sure, even, one = (1 / (1 + math.exp(-margin)) for margin in (2, 0, 1))
    errors = [abs(even - 0.0), 2 * abs(one - 0.5), abs(sure - 1.0)]  # margins 0; 1 and -1, in one bin; 2
    assert evaluation.calibration_error == pytest.approx(sum(errors) / 4)


def test_calibration_error_of_a_calibrated_model_is_zero() -> None:
    margin = math.log(3)  # a confidence of 3/4
    evaluation = summarize_scores([margin] * 3 + [0], [0] * 3 + [margin], [1] * 4, [1] * 4)
    assert evaluation.calibration_error == pytest.approx(0) and evaluation.length_correlation is None
    (only,) = calibration_bins([margin] * 3 + [-margin])
    assert (only.low, only.num_pairs, only.accuracy) == (0.75, 4, 0.75)
    assert calibration_bins([1000.0])[0].high == 1.0
