"""Models and rewards that a stage cannot train with: one line names the mistake, before a weight is loaded."""

import json

import pytest
import torch

from rekatrain.trainer.cli import main
from tests.trainer.small_recipes import DATASET, LORA, STAGES, copy_model

# The model


@pytest.mark.parametrize("stage", STAGES)
def test_model_folder_that_is_missing_is_reported(stage, recipe_of, error_of):
    assert error_of("train", recipe_of(stage), "model.pretrained_model_name_or_path=./absent") == (
        "no model folder at './absent'"
    )


def test_model_folder_without_weights_is_reported(recipe_of, workspace, model_folder, capsys):
    model = copy_model(model_folder, workspace / "model")
    (workspace / "model" / "model.safetensors").unlink()
    with pytest.raises(SystemExit) as stopped:
        main(["train", recipe_of("rloo", model=model)])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("rekatrain: error: ") and str(workspace / "model") in line
    assert not (workspace / "run").exists()


@pytest.mark.parametrize("stage", STAGES)
def test_model_rejects_a_vocabulary_below_the_tokenizers(stage, recipe_of, error_of, workspace, model_folder):
    model = copy_model(model_folder, workspace / "model", vocab_size=299)
    assert error_of("train", recipe_of(stage, model=model)) == (
        f"the model has 299 embedding rows but the tokenizer 300 ids: {str(workspace / 'model')!r} "
        "holds the tokenizer of another model"
    )


@pytest.mark.parametrize("stage", STAGES)
def test_model_rejects_an_eos_other_than_the_tokenizers(stage, recipe_of, error_of, workspace, model_folder):
    model = copy_model(model_folder, workspace / "model", eos_token_id=7)
    assert error_of("train", recipe_of(stage, model=model)).startswith(
        "config.json names eos id 7, the tokenizer 0 (<|endoftext|>): a model with the wrong eos never stops"
    )


@pytest.mark.parametrize("stage", STAGES)
def test_lora_reports_targets_that_the_model_lacks(stage, recipe_of, error_of):
    message = error_of("train", recipe_of(stage, lora={"r": 2, "target_modules": ["no_such_proj"]}))
    assert message.startswith("lora: ") and "no_such_proj" in message


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("quantization", "lora", "message"),
    [
        ({"load_in_4bit": True}, LORA, "needs a GPU, and there is none"),
        ({"load_in_4bit": True}, None, "needs a lora: section"),
        ({"bnb_4bit_quant_type": "nf4"}, LORA, "quantizes nothing: set load_in_4bit: true"),
        ({"load_in_4bits": True}, LORA, "did you mean model.quantization_config.load_in_4bit?"),
    ],
)
def test_quantization_that_cannot_be_trained_is_rejected(stage, quantization, lora, message, recipe_of, error_of):
    if torch.cuda.is_available() and "GPU" in message:
        pytest.skip("there is a GPU, which this error is about")
    path = recipe_of(stage, lora=lora)
    settings = ", ".join(f"{key}: {json.dumps(value)}" for key, value in quantization.items())
    assert message in error_of("train", path, f"model.quantization_config={{{settings}}}")


@pytest.mark.parametrize("key", ["deepspeed", "fsdp"])
def test_sft_section_does_not_decide_the_sharding(key, recipe_of, error_of):
    message = error_of("train", recipe_of("sft"), f"sft.{key}=ds.json")
    assert message == f"sft.{key} is set by the program: remove it from the recipe"


def test_rloo_rejects_lora_dropout(recipe_of, error_of):
    assert error_of("train", recipe_of("rloo", lora={**LORA, "lora_dropout": 0.1})).startswith(
        "lora.lora_dropout is 0.1, but must be 0 in stage rloo"
    )


@pytest.mark.parametrize(
    ("key", "value"), [("sliding_window", 16), ("attention_chunk_size", 8), ("attn_logit_softcapping", 50.0)]
)
def test_rloo_and_evaluate_reject_other_attention(key, value, recipe_of, error_of, model_folder, workspace):
    recipe = recipe_of("rloo", model=copy_model(model_folder, workspace / "m", **{key: value}), eval_dataset=DATASET)
    for command in ("train", "evaluate"):
        message = error_of(command, recipe)
        assert message.startswith(f"the model's config.json has {key} {value}: sampling and RLOO attend to every")


def test_rloo_rejects_attn_implementation(recipe_of, error_of, model_folder):
    model = {"pretrained_model_name_or_path": str(model_folder), "dtype": "float32", "attn_implementation": "eager"}
    assert error_of("train", recipe_of("rloo", model=model)) == (
        "model.attn_implementation is 'eager', but stage rloo brings its own attention: take the key out"
    )


@pytest.mark.parametrize("stage", STAGES)
def test_full_fine_tuning_of_bfloat16_is_rejected(stage, recipe_of, error_of, model_folder):
    unsaid = {"pretrained_model_name_or_path": str(model_folder)}  # bfloat16 is what dtype is where nothing is said
    for model in ({**unsaid, "dtype": "bfloat16"}, unsaid):
        assert error_of("train", recipe_of(stage, model=model)).startswith(
            "full fine-tuning of bfloat16 weights rounds small updates away: set model.dtype to float32"
        )


# The rewards


def test_rewards_must_not_be_empty(recipe_of, error_of):
    assert error_of("train", recipe_of("rloo", rewards={})) == (
        "rewards: at least one reward must have a weight other than 0; the recipe has None"
    )


def test_rewards_report_an_unknown_name(recipe_of, error_of):
    assert error_of("train", recipe_of("rloo", rewards={"math_answr": None})).startswith(
        "there is no reward math_answr, did you mean math_answer?"
    )


def test_rewards_report_a_column_that_the_rows_lack(recipe_of, error_of):
    assert error_of("train", recipe_of("rloo", rewards={"math_answer": None})) == (
        "reward math_answer needs the column answer, which the rows do not have (columns: none); "
        "add it to the data or take the reward out of the recipe"
    )


def test_reward_that_returns_too_few_values_is_reported(recipe_of, workspace, capsys):
    (workspace / "short_rewards.py").write_text("def short(completions, **kwargs):\n    return [1.0]\n")
    for command in (["train"], ["sample"]):
        with pytest.raises(SystemExit) as stopped:
            main([*command, recipe_of("rloo", rewards={"short_rewards:short": None}, output_dir=command[0])])
        assert stopped.value.code == 2
        assert capsys.readouterr().err.splitlines()[-1] == (
            "rekatrain: error: reward short_rewards:short returned 1 values; "
            "expected a list of 2, one finite number or None per completion"
        )


def test_reward_that_raises_shows_name_and_traceback(recipe_of, workspace, capsys):
    (workspace / "broken_rewards.py").write_text("def broken(completion):\n    return 1 / 0\n")
    with pytest.raises(SystemExit) as stopped:
        main(["sample", recipe_of("rloo", rewards={"broken_rewards:broken": None})])
    message = capsys.readouterr().err
    assert stopped.value.code == 1
    assert "error: reward broken_rewards:broken failed on " in message and "in broken" in message
    assert message.rstrip().endswith("ZeroDivisionError: division by zero")
