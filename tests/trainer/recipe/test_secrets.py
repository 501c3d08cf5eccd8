"""Secrets in a recipe: they are rejected by name, and no message or file holds them."""

import dataclasses
import json
from pathlib import Path

import pytest
from trl.trainer.reward_config import RewardConfig
from trl.trainer.sft_config import SFTConfig

from rekatrain.data.errors import InputError
from rekatrain.trainer.cli import main
from rekatrain.trainer.recipe.load import build_recipe
from rekatrain.trainer.recipe.sections import check_sections
from rekatrain.trainer.recipe.values import check_secrets

SECRET = "hf_hunter2hunter2"
RECIPE = {
    "stage": "sft",
    "output_dir": "run",
    "model": {"pretrained_model_name_or_path": "model"},
    "dataset": {"path": "rows.jsonl"},
}
SECRETS = [
    ("sft.hub_token", "sft.hub_token: a run uploads nothing"),
    ("sft.push_to_hub", "sft.push_to_hub: a run uploads nothing"),
    ("reward.hub_token", "reward.hub_token: a run uploads nothing"),
    ("reward.hub_strategy", "reward.hub_strategy: a run uploads nothing"),
    ("model.hf_token", "model.hf_token would be written"),
    ("dataset.use_auth_token", "dataset.use_auth_token would be written"),
    ("wandb.settings.api_key", "wandb.settings.api_key would be written"),
    ("rewards.judge.api_key", "rewards.judge.api_key would be written"),
    ("rewards.judge.extra_body.Authorization", "rewards.judge.extra_body.Authorization would be written"),
    ("rewards.mine:scorer.openai_api_key", "rewards.mine:scorer.openai_api_key would be written"),
    ("rewards.mine:scorer.db_password", "rewards.mine:scorer.db_password would be written"),
    ("evaluate.aws_secret_access_key", "evaluate.aws_secret_access_key would be written"),
    ("lora.client_secret", "lora.client_secret would be written"),
]


@pytest.mark.parametrize(("key", "message"), SECRETS)
def test_check_secrets_rejects_a_secret_by_name(key: str, message: str) -> None:
    recipe = build_recipe(json.loads(json.dumps(RECIPE)), [f"{key}={SECRET}"])
    with pytest.raises(InputError) as caught:
        check_sections(recipe)
    assert str(caught.value).startswith(message) and SECRET not in str(caught.value)


@pytest.mark.parametrize("config", [SFTConfig, RewardConfig])
def test_check_secrets_rejects_every_hub_key_of_trl(config: type) -> None:
    names = [field.name for field in dataclasses.fields(config)]
    keys = [name for name in names if "hub" in name]
    assert {"hub_token", "push_to_hub", "hub_model_id"} <= set(keys)
    for key in keys:
        with pytest.raises(InputError, match=f"^sft.{key}: a run uploads nothing"):
            check_secrets({"sft": {key: None}})
    check_secrets({"sft": {name: None for name in names if name not in keys}})


def test_check_secrets_accepts_names_of_tokens_and_variables() -> None:
    check_secrets(
        {
            "sft": {"eos_token": "x", "pad_token": "y"},
            "rloo": {"micro_batch_tokens": 1, "trainable_token_indices": []},
            "rewards": {"judge": {"api_key_env": "JUDGE_KEY", "max_tokens": 9}, "mine:scorer": {"token": "word"}},
            "scoring": {"environment": ["OPENAI_API_KEY"]},
        }
    )


@pytest.mark.parametrize("option", [[], ["--dry-run"]])
def test_train_never_shows_or_writes_a_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], option: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(json.dumps({**RECIPE, "sft": {"hub_token": SECRET}}))
    with pytest.raises(SystemExit):
        main(["train", "recipe.yaml", *option])
    shown = capfd.readouterr()
    assert "sft.hub_token: a run uploads nothing" in shown.err and SECRET not in shown.out + shown.err
    assert not Path("run").exists()
