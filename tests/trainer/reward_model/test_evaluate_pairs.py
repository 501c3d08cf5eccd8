"""The measurements of a reward model on pairs of scores."""

import math

import pytest
from transformers import LlamaForSequenceClassification

from rekatrain.data.errors import InputError
from rekatrain.trainer.reward_model.evaluate_pairs import evaluate_pairs
from rekatrain.trainer.reward_model.measures import calibration_bins, evaluation_tables, summarize_scores
from rekatrain.trainer.reward_model.pairs import load_pairs
from tests.conftest import tiny_config, write_jsonl


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


def test_summarize_scores_by_source_by_row_and_by_length() -> None:
    evaluation = summarize_scores(
        [2.0, 2.0, 2.0, 0.0],
        [1.0, 3.0, 0.0, 1.0],
        [9, 9, 1, 5],
        [5, 5, 5, 5],
        sources=["Chat", "Chat", "Math", "Math"],
        rows=["a", "a", "b", "c"],
    )
    rates = {name: (one.num_right, one.num_graded) for name, one in evaluation.by_source.items()}
    assert rates == {"Chat": (1, 2), "Math": (1, 2)}
    assert (evaluation.by_row.num_right, evaluation.by_row.num_graded) == (1, 3)  # a chosen answer must beat all
    assert evaluation.if_longer is not None and evaluation.if_shorter is not None
    assert (evaluation.if_longer.num_right, evaluation.if_longer.num_graded) == (1, 2)
    assert (evaluation.if_shorter.num_right, evaluation.if_shorter.num_graded) == (1, 1)
    tables = evaluation_tables(evaluation)
    assert "accuracy 50.0% of 2 pairs whose chosen answer is longer and 100.0% of 1 where it is shorter" in tables
    assert "in 33.3% of 3" in tables and "Chat" in tables and "mean of the sources: 50.0%" in tables


def test_evaluation_tables_plot_accuracy_beside_confidence() -> None:
    margin = math.log(3)  # a confidence of 3/4, of 40 places the 30th
    tables = evaluation_tables(summarize_scores([margin] * 3 + [0], [0] * 3 + [margin], [1] * 4, [1] * 4))
    (line,) = [line for line in tables.splitlines() if line.startswith("  0.75")]
    assert line.endswith("  " + "#" * 30 + "|") and "75.0%" in line and "1.099" in line


ROWS = [
    {"id": 1, "prompt": "Add 1 and 2.", "chosen": "3", "rejected": "4", "subset": "math-prm", "chosen_model": "human"},
    {"id": 2, "prompt": "Name a color.", "chosen": ["Blue."], "rejected": ["Dog.", "No.", "Seven."], "subset": "Focus"},
    {
        "id": 3,
        "prompt": [{"role": "user", "content": "Hi"}],
        "chosen": [{"role": "assistant", "content": "Hello."}],
        "rejected": [{"role": "assistant", "content": "Go."}],
        "subset": "Focus",
    },
]


def test_rewardbench_rows_become_pairs_by_subset(tmp_path, tokenizer) -> None:
    section = {"path": write_jsonl(tmp_path / "bench.jsonl", *ROWS), "format": "rewardbench"}
    pairs = load_pairs(section, tokenizer, {}, max_length=1000)
    assert [pair.source for pair in pairs] == ["math-prm", "Focus", "Focus", "Focus", "Focus"]
    rejected = [tokenizer.decode(pair.rejected.input_ids) for pair in pairs]
    wrong = ("4", "Dog.", "No.", "Seven.", "Go.")
    assert all(text.rstrip().endswith(f"{answer} <sep>") for text, answer in zip(rejected, wrong, strict=True))
    model = LlamaForSequenceClassification(tiny_config(tokenizer, num_labels=1, pad_token_id=0))
    evaluation = evaluate_pairs(model, pairs)
    assert {name: one.num_graded for name, one in evaluation.by_source.items()} == {"Focus": 4, "math-prm": 1}
    assert evaluation.by_row.num_graded == 3 and evaluation.accuracy.num_graded == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rejected": []}, "rejected"),
        ({"rejected": ["4", "3"]}, "chosen and rejected are the same"),
        ({"chosen": None}, "chosen"),
        ({"rejected": [["4"]]}, "must be an object with role and content"),
    ],
)
def test_rewardbench_names_a_bad_row(tmp_path, tokenizer, change: dict, message: str) -> None:
    section = {"path": write_jsonl(tmp_path / "bench.jsonl", {**ROWS[0], **change}), "format": "rewardbench"}
    with pytest.raises(InputError, match=rf"bench.jsonl:1.*{message}"):
        load_pairs(section, tokenizer, {}, max_length=1000)
