"""The reward stage and the reward `reward_model`: the loss, the measures, the scores, and a run from end to end."""

import json
import math
import stat
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from ruamel.yaml import YAML
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BertConfig, PreTrainedTokenizerFast
from trl.trainer.reward_trainer import RewardTrainer

from rekatrain.data.errors import InputError
from rekatrain.data.reward_model_input import RewardModelInput, encode_reward_model_input
from rekatrain.rewards.compose import build_reward_functions
from rekatrain.rewards.errors import RewardError
from rekatrain.rewards.models.classifier import CARD_FILE, classify, set_pad
from rekatrain.rewards.models.local import RewardModel
from rekatrain.trainer.cli import main
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.reward_model import train
from rekatrain.trainer.reward_model.evaluate_pairs import calibration_bins, summarize_scores
from rekatrain.trainer.reward_model.model import load_reward_model
from tests.conftest import tiny_config

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
QUESTIONS = ["What is 2+2?", "Name a colour.", "17 + 25 =", "Say hello.", "Be brief.", "Is it so?"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with preferences for the answer that ends in a question mark."""
    for name, questions in (("train", QUESTIONS[:4]), ("held_out", QUESTIONS[3:])):
        rows = [
            {"prompt": f"{question} {n}", "chosen": f"{'so ' * (n % 3)}it is?", "rejected": f"it is{' so' * (n % 2)}!"}
            for question in questions
            for n in range(4)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({**row, "margin": 0.5}) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path


def write_recipe(folder: Path, name: str, model: Path, *, reward: dict | None = None, **sections: object) -> str:
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "logging_steps": 1}
    settings |= {"save_steps": 2, "gradient_checkpointing": False, "lr_scheduler_type": "constant"} | (reward or {})
    tree = {
        "stage": "reward",
        "output_dir": str(folder / name),
        "seed": 3,
        "model": {"pretrained_model_name_or_path": str(model), "dtype": "float32"},
        "dataset": {"path": str(folder / "train.jsonl"), "format": "preference"},
        "eval_dataset": {"path": str(folder / "held_out.jsonl"), "format": "preference"},
        "reward": settings,
        **sections,
    }
    (folder / f"{name}.json").write_text(json.dumps(tree))
    return str(folder / f"{name}.json")


@pytest.fixture(scope="module")
def encoder_folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT with two labels, and a tokenizer with `[CLS]` and `[SEP]` and no eos token."""
    folder = tmp_path_factory.mktemp("encoder")
    with_marks = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(with_marks),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.3,
        pad_token_id=with_marks.pad_token_id,
        id2label={0: "rude", 1: "polite"},
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    with_marks.save_pretrained(folder)
    return folder


def with_scale(folder: Path, to: Path, **card: object) -> Path:
    """A copy of a reward model's folder with another card."""
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    whole = {"template": "reka", "reasoning": False, "mean": 0.0, "std": 1.0, "measured_on": "nothing"} | card
    (to / CARD_FILE).write_text(json.dumps(whole))
    return to


@pytest.fixture(scope="module")
def decoder_folder(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with one output, and a tokenizer without a pad token."""
    folder = tmp_path_factory.mktemp("decoder")
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 128}
    config = tiny_config(tokenizer, initializer_range=0.3, num_labels=1, **sizes)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rewards_of(folder: Path, *completions: str, **options: object) -> list:
    reward = RewardModel(pretrained_model_name_or_path=str(folder), **options)
    reward.setup()
    return reward(prompts=["human: What is 2+2? <sep> assistant:"] * len(completions), completions=completions)


# Training


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_the_loss_is_bradley_and_terrys_with_margin_and_centring(
    kind: str, folder: Path, model_folder: Path, encoder_folder: Path, tmp_path: Path
) -> None:
    if kind == "encoder":  # the labels go, the encoder stays
        source = tmp_path / "one_label"
        source.mkdir()
        for file in encoder_folder.iterdir():
            (source / file.name).write_bytes(file.read_bytes())
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(
            json.dumps({**config, "id2label": {"0": "score"}, "label2id": {"score": 0}})
        )
        encoder = AutoModelForSequenceClassification.from_pretrained(source, ignore_mismatched_sizes=True)
        encoder.save_pretrained(source)
    else:
        source = model_folder
    recipe = Recipe(
        stage="reward",
        output_dir=str(tmp_path / "run"),
        model={"pretrained_model_name_or_path": str(source), "dtype": "float32"},
        dataset={"path": str(folder / "train.jsonl"), "format": "preference"},
        reward={"per_device_train_batch_size": 16, "center_rewards_coefficient": 0.1, "gradient_checkpointing": False},
    )
    task = train.prepare(recipe)
    model = load_reward_model(task.tokenizer, **recipe.model)
    data = train._dataset(task.pairs)
    trainer = RewardTrainer(model=model, args=task.config, train_dataset=data, processing_class=task.tokenizer)
    (batch,) = trainer.get_train_dataloader()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model.eval(), dict(batch)).item()

    chosen, rejected = (
        torch.cat([classify(model, [row], micro_batch_tokens=1)[:, 0] for row in rows])
        for rows in ([pair.chosen for pair in task.pairs], [pair.rejected for pair in task.pairs])
    )
    expected = -torch.nn.functional.logsigmoid(chosen - rejected - 0.5).mean() + 0.1 * ((chosen + rejected) ** 2).mean()
    assert loss == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_a_stopped_run_goes_on_bit_for_bit(folder: Path, model_folder: Path, lora: dict | None) -> None:
    main(["train", write_recipe(folder, "whole", model_folder, lora=lora)])
    stopped = write_recipe(folder, "stopped", model_folder, lora=lora)
    main(["train", stopped, "reward.max_steps=2"])
    main(["train", stopped, "--resume"])
    main(["train", stopped, "--resume"])  # finished: takes no further step
    found = []
    for name in ("whole", "stopped"):
        (file,) = (folder / name / "checkpoints" / "checkpoint-4").glob("*model.safetensors")
        lines = (folder / name / "metrics.jsonl").read_text().splitlines()
        evaluation = json.loads((folder / name / "evaluation.json").read_text())
        found.append((load_file(file), [json.loads(line)["loss"] for line in lines], evaluation))
    (weights, losses, evaluation), (weights_again, *others) = found
    assert weights.keys() == weights_again.keys() and any("score" in key for key in weights)
    assert all(torch.equal(weights[key], weights_again[key]) for key in weights)
    assert others == [losses, evaluation] and len(losses) == 4


def test_reward_model_from_training_to_rloo(
    folder: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(
        folder, "reward", model_folder, lora=LORA, reward={"max_steps": 40, "learning_rate": 2e-2, "save_steps": 40}
    )
    main(["train", recipe, "--dry-run"])
    shown = capsys.readouterr().out
    assert "# 16 pairs" in shown and "# 8 pairs held out" in shown and "assistant: it is? <sep>" in shown
    main(["train", recipe])
    evaluation = json.loads((folder / "reward" / "evaluation.json").read_text())
    assert evaluation["accuracy"]["num_graded"] == 8  # the prompts of a question that is trained on are left out
    assert evaluation["accuracy"]["accuracy"] == 1.0 and evaluation["longer_wins"] < 1
    main(["export", str(folder / "reward"), str(folder / "export")])
    card = json.loads((folder / "export" / CARD_FILE).read_text())
    assert (card["mean"], card["std"]) == pytest.approx((evaluation["mean"], evaluation["std"]), abs=1e-4)
    assert_the_export_says_how_it_is_served(folder / "export", card)

    # The run (base and adapter) and the export (merged) are one model.
    accuracies = []
    for name in ("reward", "export"):
        main(
            [
                "evaluate",
                recipe,
                f"model.pretrained_model_name_or_path={folder / name}",
                "--out",
                str(folder / "e.json"),
            ]
        )
        accuracies.append(json.loads((folder / "e.json").read_text()))
    assert accuracies[0]["mean"] == pytest.approx(accuracies[1]["mean"], abs=1e-4)
    good, bad = rewards_of(folder / "export", " it is? <sep>", " it is! <sep>")
    assert good > bad and (good - bad) * card["std"] > 1

    rloo = {
        "stage": "rloo",
        "output_dir": str(folder / "rloo"),
        "model": {"pretrained_model_name_or_path": str(model_folder), "dtype": "float32"},
        "dataset": {"path": str(folder / "train.jsonl"), "format": "preference"},
        "rewards": {"reward_model": {"pretrained_model_name_or_path": str(folder / "export")}},
        "rloo": {"max_steps": 2, "prompts_per_step": 2, "num_generations": 4, "max_completion_length": 8},
    }
    (folder / "rloo.json").write_text(json.dumps(rloo))
    main(["train", str(folder / "rloo.json")])
    steps = [json.loads(line) for line in (folder / "rloo" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2 and all(math.isfinite(step["rewards/reward_model/mean"]) for step in steps)
    assert steps[0]["reward_model/num_cut"] == 0


def assert_the_export_says_how_it_is_served(export: Path, scale: dict) -> None:
    card = ModelCard.load(export / "README.md")
    assert card.data.pipeline_tag == "text-classification"
    assert "accuracy 100.0% [" in card.text and "of 8 held-out pairs" in card.text and "| `margin` |" in card.text
    names = ("reward_model", "remote_reward_model")
    specs = [YAML(typ="safe").load(export / "serving" / f"{name}.yaml")["rewards"] for name in names]
    for name, spec in zip(names, specs, strict=True):
        build_reward_functions(spec)  # every option is one that the reward takes
        assert list(spec) == [name]
    remote = specs[1]["remote_reward_model"]
    assert (remote["mean"], remote["std"], remote["model"]) == (scale["mean"], scale["std"], "export")
    assert specs[0]["reward_model"]["pretrained_model_name_or_path"] == str(export)
    line = (export / "serving" / "vllm.sh").read_text()
    assert "--served-model-name export --runner pooling --dtype float32" in line and "--max-model-len 256" in line
    files = [path for path in export.rglob("*") if path.is_file()]
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o644 for path in files)


def test_what_the_stage_cannot_do_is_told_in_one_line(folder: Path, model_folder: Path, capsys) -> None:
    def told(*command: str) -> str:
        with pytest.raises(SystemExit) as caught:
            main(list(command))
        assert caught.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    recipe = write_recipe(folder, "run", model_folder)
    assert "samples nothing" in told("sample", recipe)
    assert "train.jsonl:1: there is no rejected answer" in told("train", recipe, "dataset.format=prompt_answer")
    assert "reward.chat_template_path is set by the program" in told("train", recipe, "reward.chat_template_path=x")
    assert "unknown key reward.epochs" in told("train", recipe, "reward.epochs=3")
    assert "16 of 16 pairs are longer than 4 tokens" in told("train", recipe, "reward.max_length=4")
    assert "nothing held out" in told("train", recipe, f"eval_dataset.path={folder}/train.jsonl")
    assert "full fine-tuning of bfloat16" in told("train", recipe, "model.dtype=bfloat16")
    assert not (folder / "run").exists()


# Measures


def test_the_measures_by_hand() -> None:
    found = summarize_scores([2.0, 1.0, 0.0, 5.0], [0.0, 2.0, 0.0, 4.0], [3, 3, 3, 9], [2, 3, 5, 9])
    assert (found.accuracy.num_right, found.accuracy.num_graded) == (2, 4)  # the tie counts as wrong
    assert found.longer_wins == (1 + 0.5 + 0 + 0.5) / 4
    assert (found.mean, found.std) == pytest.approx((1.75, math.sqrt(25.5 / 8)))
    sure, even, one = (1 / (1 + math.exp(-margin)) for margin in (2, 0, 1))
    errors = [abs(even - 0.0), 2 * abs(one - 0.5), abs(sure - 1.0)]  # margins 0; 1 and -1, in one bin; 2
    assert found.calibration_error == pytest.approx(sum(errors) / 4)


def test_a_calibrated_model_has_no_calibration_error() -> None:
    margin = math.log(3)  # a confidence of 3/4
    found = summarize_scores([margin] * 3 + [0], [0] * 3 + [margin], [1] * 4, [1] * 4)
    assert found.calibration_error == pytest.approx(0) and found.length_correlation is None
    (only,) = calibration_bins([margin] * 3 + [-margin])
    assert (only.low, only.num_pairs, only.accuracy) == (0.75, 4, 0.75)
    assert calibration_bins([1000.0])[0].high == 1.0


# Scores


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
@pytest.mark.parametrize("template", ["reka", "pair", "answer"])
def test_scores_do_not_depend_on_the_micro_batch(kind: str, template: str, request: pytest.FixtureRequest) -> None:
    source = request.getfixturevalue(f"{kind}_folder")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
    model = AutoModelForSequenceClassification.from_pretrained(source).eval()
    set_pad(model, tokenizer)
    prompt = [{"role": "user", "content": "What is 2+2?"}]
    rows = [
        encode_reward_model_input(
            RewardModelInput(prompt=prompt, answer="four " * n), tokenizer, template, max_length=128
        )
        for n in (3, 1, 9, 2, 1, 7)
    ]
    one_by_one = torch.cat([classify(model, [row], micro_batch_tokens=10_000) for row in rows])
    assert one_by_one.std(dim=0).min() > 1e-3
    for micro_batch_tokens in (1, 100, 10_000):
        together = classify(model, rows, micro_batch_tokens=micro_batch_tokens)
        assert torch.allclose(together, one_by_one, atol=1e-5)


def test_an_encoder_reads_two_texts_as_it_was_trained_to(encoder_folder: Path) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(encoder_folder)
    prompt = [{"role": "user", "content": "Hi"}]
    ids = encode_reward_model_input(
        RewardModelInput(prompt=prompt, answer="[SEP] yes"), tokenizer, "pair", max_length=128
    )
    marks = [tokenizer.cls_token_id, tokenizer.sep_token_id]
    assert [token for token in ids.input_ids if token in marks] == [marks[0], marks[1], marks[1]]
    first = ids.input_ids.index(marks[1]) + 1
    assert ids.token_type_ids == [0] * first + [1] * (len(ids.input_ids) - first)


def test_the_scale_is_frozen_and_options_come_before_the_folder(decoder_folder: Path, tmp_path: Path) -> None:
    texts = (" four <sep>", " <reasoning>\nTwo.\n</reasoning>\n\nfour <sep>", " five", "")
    raw = rewards_of(decoder_folder, *texts)
    assert raw[0] == pytest.approx(raw[1], abs=1e-5) and abs(raw[1] - raw[2]) > 1e-3  # the reasoning is not judged
    scaled = rewards_of(with_scale(decoder_folder, tmp_path / "scaled", mean=0.5, std=2.0), *texts)
    assert scaled == pytest.approx([(value - 0.5) / 2 for value in raw], abs=1e-5)
    given = rewards_of(tmp_path / "scaled", *texts, mean=1.0, std=4.0)
    assert given == pytest.approx([(value - 1) / 4 for value in raw], abs=1e-5)
    thoughtful = rewards_of(with_scale(decoder_folder, tmp_path / "thoughtful", reasoning=True), *texts)
    assert thoughtful[0] == pytest.approx(raw[0], abs=1e-5) and abs(thoughtful[1] - raw[1]) > 1e-3


def test_several_labels_need_one_to_be_named(encoder_folder: Path, decoder_folder: Path) -> None:
    polite, rude = (
        rewards_of(encoder_folder, " four <sep>", template="pair", label=name)[0] for name in ("polite", "rude")
    )
    assert polite + rude == pytest.approx(1) and 0 < polite < 1
    with pytest.raises(InputError, match="labels rude, polite: name the one"):
        rewards_of(encoder_folder, "")
    with pytest.raises(InputError, match="label 'kind' is not one of them"):
        rewards_of(encoder_folder, "", label="kind")
    with pytest.raises(InputError, match="not one of them"):
        rewards_of(decoder_folder, "", label="polite")


def test_a_score_that_is_no_number_is_an_error_and_what_is_too_long_is_counted(decoder_folder: Path, tmp_path) -> None:
    reward = RewardModel(pretrained_model_name_or_path=str(decoder_folder))
    reward.setup()
    prompts = ["human: Hi <sep> assistant:"] * 2
    short, long = reward(prompts=prompts, completions=[" four", " four" * 200])
    assert isinstance(short, float) and isinstance(long, float)
    assert [reward.metrics(), reward.metrics()] == [{"num_cut": 1.0}, {"num_cut": 0.0}]
    answers = RewardModel(pretrained_model_name_or_path=str(decoder_folder), template="answer")
    answers.setup()
    for completions in (["", " four"], ["", ""]):
        values = answers(prompts=prompts, completions=completions)
        assert [isinstance(value, RewardError) for value in values] == [text == "" for text in completions]
    reward._model.score.weight.data.fill_(math.nan)
    assert all(isinstance(value, RewardError) for value in reward(prompts=prompts, completions=["a", "b"]))


def test_what_is_no_reward_model_is_told(model_folder: Path, decoder_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a sequence classifier: it has no weights for score.weight"):
        rewards_of(model_folder, "")
    with pytest.raises(InputError, match="no chat template"):
        rewards_of(decoder_folder, "", template="chat_template")
    broken = with_scale(decoder_folder, tmp_path / "broken", mood="good")
    with pytest.raises(InputError, match="reward_model.json cannot be read"):
        rewards_of(broken, "")
    for options, told in [
        ({"template": "chatml"}, "template must be one of"),
        ({"mean": 1.0}, "go together"),
        ({"mean": 0.0, "std": 0.0}, "std above 0"),
        ({"micro_batch_tokens": 0}, "at least 1"),
        ({"pretrained_model_name_or_path": "./nowhere"}, "no reward model at './nowhere'"),
    ]:
        with pytest.raises(InputError, match=told):
            RewardModel(**{"pretrained_model_name_or_path": str(decoder_folder)} | options)
