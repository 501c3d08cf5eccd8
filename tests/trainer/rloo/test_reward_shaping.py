"""Several rewards in a step: scaled one by one (GDPO), weighted by the step, with metrics and notes."""

import json
import math
from dataclasses import replace

import pytest
import torch
from trl.trainer.utils import nanstd

from rekatrain.data.errors import InputError
from rekatrain.rewards import Score
from rekatrain.rewards.compose import RewardFunction, build_reward_functions
from rekatrain.rewards.progress import Schedule
from rekatrain.trainer.api import check_recipe
from rekatrain.trainer.rloo.group import scale_per_reward
from rekatrain.trainer.rloo.loss import leave_one_out_advantages
from rekatrain.trainer.rloo.metrics import step_metrics
from tests.conftest import tiny_llama
from tests.helpers.rloo import advantages_by_hand, by_completion, make_setup, run_step


def terms(weights, values):
    """Return the terms of each completion; None in `values` where a reward does not apply."""
    return [
        {name: (weights[name], value) for name, value in of_one.items() if value is not None} or None
        for of_one in values
    ]


def test_scale_per_reward_tells_equal_sums_apart_by_numbers():
    # By its deviation, a reward that is four times as large counts no more than the other.
    values = [{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 0.0}, {"a": 1.0, "b": 4.0}, {"a": 0.0, "b": 4.0}]
    scaled = scale_per_reward(terms({"a": 1.0, "b": 1.0}, values))
    std_a, std_b = math.sqrt(1 / 3), math.sqrt(16 / 3)
    one_a, one_b = 0.5 / (std_a + 1e-4), 2.0 / (std_b + 1e-4)
    expected = [one_a - one_b, -one_a - one_b, one_a + one_b, -one_a + one_b]
    assert scaled == pytest.approx(expected, abs=1e-12)
    advantages = leave_one_out_advantages(torch.tensor([scaled], dtype=torch.float64))[0].tolist()
    assert advantages == pytest.approx([4 / 3 * reward for reward in expected], abs=1e-12)


def test_scale_per_reward_equals_trls_normalize_then_sum():
    torch.manual_seed(0)
    rewards_PGK = torch.randn(5, 6, 3, dtype=torch.float64) * torch.tensor([1.0, 100.0, 0.01])
    rewards_PGK[0, 2, 1] = rewards_PGK[3, :, 0] = torch.nan
    rewards_PGK[1, :, 2] = 0.25
    weights_K = torch.tensor([1.0, 0.1, -2.0], dtype=torch.float64)
    # The lines of GRPOTrainer (TRL 1.16), before its normalization over the batch. nanstd counts in float32.
    scaled_PGK = (rewards_PGK - rewards_PGK.nanmean(dim=1, keepdim=True)) / (nanstd(rewards_PGK, 1, True) + 1e-4)
    expected_PG = (scaled_PGK * weights_K).nansum(dim=2)
    for group, expected in zip(rewards_PGK.tolist(), expected_PG.tolist(), strict=True):
        values = [{str(k): None if math.isnan(value) else value for k, value in enumerate(of_one)} for of_one in group]
        weights = {str(k): weight for k, weight in enumerate(weights_K.tolist())}
        assert scale_per_reward(terms(weights, values)) == pytest.approx(expected, abs=1e-6)


def test_scale_per_reward_leaves_out_what_cannot_be_scored():
    scaled = scale_per_reward([{"a": (1.0, 2.0)}, None, {"a": (1.0, 0.0)}])
    assert math.isnan(scaled[1]) and scaled[0] == -scaled[2] == pytest.approx(1 / (math.sqrt(2) + 1e-4))
    assert scale_per_reward([{"a": (1.0, 2.0)}, {"a": (1.0, 2.0)}]) == [0.0, 0.0]
    assert scale_per_reward([{"a": (1.0, 2.0)}]) == [0.0]


def parity(completion_ids, **_):
    return [float(sum(ids) % 2) for ids in completion_ids]


def large(completion_ids, **_):
    return [1000.0 * (sum(ids) % 5) for ids in completion_ids]


def two_rewards(setup, **first):
    rewards = [
        RewardFunction(name="parity", function=parity, columns=(), **{"weight": 1.0, **first}),
        RewardFunction(name="large", weight=1.0, function=large, columns=()),
    ]
    return replace(setup, rewards=rewards)


def test_step_trains_on_scaled_rewards_and_records_plain_ones(tokenizer):
    setup = two_rewards(make_setup(tokenizer, advantage_scaling="per_reward", num_generations=6))
    records, _ = run_step(tiny_llama(tokenizer), setup)
    assert records == by_completion(records)
    assert all(r["reward"] == r["rewards"]["parity"] + r["rewards"]["large"] for r in records)
    for index in {record["prompt_index"] for record in records}:
        group = [record for record in records if record["prompt_index"] == index]
        expected = scale_per_reward(terms({"parity": 1.0, "large": 1.0}, [record["rewards"] for record in group]))
        assert [record["scaled_reward"] for record in group] == pytest.approx(expected)
        plain = [{**record, "reward": scaled} for record, scaled in zip(group, expected, strict=True)]
        assert [record["advantage"] for record in group] == pytest.approx(advantages_by_hand(plain), abs=1e-5)


def test_step_weighs_rewards_by_their_schedule(tokenizer):
    setup = two_rewards(make_setup(tokenizer, max_steps=9), weight=0.0, schedule=Schedule.read([[0, 0.0], [4, 2.0]]))
    records, _ = run_step(tiny_llama(tokenizer), setup)
    assert all(record["reward"] == record["rewards"]["large"] for record in records)
    assert setup.grader.metrics()["rewards/parity/weight"] == 0.0


@pytest.mark.parametrize(
    ("points", "step", "weight"),
    [
        ([[0, 1.0], [500, 0.2]], 0, 1.0),
        ([[0, 1.0], [500, 0.2]], 250, 0.6),
        ([[0, 1.0], [500, 0.2]], 500, 0.2),
        ([[0, 1.0], [500, 0.2]], 10_000, 0.2),
        ([[100, 1.0], [200, 3.0]], 7, 1.0),
        ([[499, 1.0], [500, 0.0], [600, 1.0]], 499, 1.0),
        ([[499, 1.0], [500, 0.0], [600, 1.0]], 500, 0.0),
        ([[499, 1.0], [500, 0.0], [600, 1.0]], 550, 0.5),
        (0.3, 99, 0.3),
    ],
)
def test_schedule_is_linear_between_its_points(points, step, weight):
    assert Schedule.read(points).at(step) == pytest.approx(weight, abs=1e-15)


def reporting(completion_ids, **_):
    return [Score(sum(ids) % 7 / 7, {"ids": len(ids)}, notes={"first": ids[0]}) for ids in completion_ids]


def test_records_hold_metrics_and_notes_of_rewards(tokenizer):
    records, _ = run_step(tiny_llama(tokenizer), make_setup(tokenizer, reporting))
    assert all(record["reward_notes"] == {"reward": {"first": record["completion_ids"][0]}} for record in records)
    lengths = [len(record["completion_ids"]) for record in records]
    assert step_metrics(records)["rewards/reward/ids"] == pytest.approx(sum(lengths) / len(lengths))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ("[[0, 1.0], [0, 2.0]]", "pairs in the order of their steps"),
        ("[[9, 1.0], [3, 2.0]]", "pairs in the order of their steps"),
        ("[]", "at least 1 item"),
        ("[[0]]", "at least 2 items"),
        ("[[-1, 1.0]]", "greater than or equal to 0"),
        ("[[0.5, 1.0]]", "valid integer"),
        ("[[0, high]]", "valid number"),
    ],
)
def test_recipe_with_a_wrong_schedule_is_rejected(tmp_path, weight, message):
    with pytest.raises(InputError, match=message):
        check_recipe(tiny_recipe(tmp_path), f"rewards.reasoning_format.weight={weight}")


def test_recipe_with_a_schedule_is_accepted(tmp_path):
    recipe = check_recipe(tiny_recipe(tmp_path), "rewards.reasoning_format.weight=[[0, 1.0], [9, 0]]")
    (function,) = build_reward_functions(recipe.rewards)
    assert [function.weight_at(step) for step in (0, 3, 9, 99)] == pytest.approx([1.0, 2 / 3, 0.0, 0.0])


def tiny_recipe(folder):
    tree = {"stage": "rloo", "output_dir": str(folder / "run"), "model": {"pretrained_model_name_or_path": "x"}}
    tree |= {"dataset": {"path": "x.jsonl"}, "rloo": {"max_steps": 1}, "rewards": {"reasoning_format": {}}}
    (folder / "recipe.yaml").write_text(json.dumps(tree))
    return folder / "recipe.yaml"
