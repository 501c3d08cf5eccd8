"""The reward stage: the loss, resuming, and a run from training to export to RLOO."""

import json
import math
import stat
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from ruamel.yaml import YAML
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast
from trl.trainer.reward_trainer import RewardTrainer

from rekatrain.rewards.compose import build_reward_functions
from rekatrain.rewards.models.classifier import CARD_FILE, classify
from rekatrain.trainer.cli import main
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.reward_model import train
from rekatrain.trainer.reward_model.model import load_reward_model
from tests.helpers.reward_models import rewards_of, save_encoder

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
    """A tiny BERT with two labels; read only."""
    folder = tmp_path_factory.mktemp("encoder")
    save_encoder(folder, tokenizer)
    return folder


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_loss_is_bradley_and_terrys_with_margin_and_centering(
    kind: str, folder: Path, model_folder: Path, encoder_folder: Path, tmp_path: Path
) -> None:
    if kind == "encoder":  # keep the encoder, replace the two labels by one
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
        torch.cat([classify(model, [answer], micro_batch_tokens=1)[:, 0] for answer in answers])
        for answers in ([pair.chosen for pair in task.pairs], [pair.rejected for pair in task.pairs])
    )
    expected = -torch.nn.functional.logsigmoid(chosen - rejected - 0.5).mean() + 0.1 * ((chosen + rejected) ** 2).mean()
    assert loss == pytest.approx(expected.item(), abs=1e-5)


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_train_resumes_a_stopped_run_bit_for_bit(folder: Path, model_folder: Path, lora: dict | None) -> None:
    main(["train", write_recipe(folder, "whole", model_folder, lora=lora)])
    stopped = write_recipe(folder, "stopped", model_folder, lora=lora)
    main(["train", stopped, "reward.max_steps=2"])
    main(["train", stopped, "--resume"])
    main(["train", stopped, "--resume"])  # finished: takes no further step
    results = []
    for name in ("whole", "stopped"):
        (file,) = (folder / name / "checkpoints" / "checkpoint-4").glob("*model.safetensors")
        lines = (folder / name / "metrics.jsonl").read_text().splitlines()
        evaluation = json.loads((folder / name / "evaluation.json").read_text())
        results.append((load_file(file), [json.loads(line)["loss"] for line in lines], evaluation))
    (weights, losses, evaluation), (weights_again, *others) = results
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
    assert_export_describes_its_serving(folder / "export", card)

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
    key = "rewards.reward_model.pretrained_model_name_or_path"
    main(["train", str(folder / "rloo.json"), "--dry-run", f"{key}=[{folder}/export, {folder}/export]"])
    capsys.readouterr()
    for name, message in (
        (model_folder, "is a LlamaForCausalLM and no sequence classifier"),
        (folder / "reward", "is a run, and the reward needs a whole classifier"),
    ):
        with pytest.raises(SystemExit):
            main(["train", str(folder / "rloo.json"), "--dry-run", f"{key}={name}"])
        assert message in capsys.readouterr().err
    main(["train", str(folder / "rloo.json")])
    steps = [json.loads(line) for line in (folder / "rloo" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 2 and all(math.isfinite(step["rewards/reward_model/mean"]) for step in steps)
    assert steps[0]["rewards/reward_model/num_cut"] == 0


def assert_export_describes_its_serving(export: Path, scale: dict) -> None:
    card = ModelCard.load(export / "README.md")
    assert card.data.pipeline_tag == "text-classification"
    assert "accuracy 100.0% [" in card.text and "of 8 held-out pairs" in card.text and "| `margin` |" in card.text
    names = ("reward_model", "remote_reward_model")
    specs = [YAML(typ="safe").load(export / "serving" / f"{name}.yaml")["rewards"] for name in names]
    for name, spec in zip(names, specs, strict=True):
        build_reward_functions(spec)  # raises InputError for an unknown option
        assert list(spec) == [name]
    remote = specs[1]["remote_reward_model"]
    assert (remote["mean"], remote["std"], remote["model"]) == (scale["mean"], scale["std"], "export")
    assert specs[0]["reward_model"]["pretrained_model_name_or_path"] == str(export)
    script = (export / "serving" / "vllm.sh").read_text()
    assert "--served-model-name export --runner pooling --dtype float32" in script and "--max-model-len 256" in script
    files = [path for path in export.rglob("*") if path.is_file()]
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o644 for path in files)


def test_reward_stage_rejects_input_in_one_line(folder: Path, model_folder: Path, capsys) -> None:
    def error_of(*command: str) -> str:
        with pytest.raises(SystemExit) as caught:
            main(list(command))
        assert caught.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    recipe = write_recipe(folder, "run", model_folder)
    assert "samples nothing" in error_of("sample", recipe)
    assert "train.jsonl:1: there is no rejected answer" in error_of("train", recipe, "dataset.format=prompt_answer")
    assert "reward.chat_template_path is set by the program" in error_of("train", recipe, "reward.chat_template_path=x")
    assert "unknown key reward.epochs" in error_of("train", recipe, "reward.epochs=3")
    assert "16 of 16 pairs are longer than 4 tokens" in error_of("train", recipe, "reward.max_length=4")
    assert "nothing held out" in error_of("train", recipe, f"eval_dataset.path={folder}/train.jsonl")
    assert "full fine-tuning of bfloat16" in error_of("train", recipe, "model.dtype=bfloat16")
    assert not (folder / "run").exists()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("without its head", "lacks the tensor base_model.model.score.weight"),
        ("of no task", "has no score.weight, and neither has its base"),
        ("of a language model", "was trained on a language model (task_type CAUSAL_LM), and has no head"),
    ],
)
def test_adapter_without_a_trained_head_is_rejected(
    folder: Path, model_folder: Path, capsys: pytest.CaptureFixture[str], kind: str, message: str
) -> None:
    task = {"without its head": "SEQ_CLS", "of no task": None, "of a language model": "CAUSAL_LM"}[kind]
    auto = AutoModelForCausalLM if task == "CAUSAL_LM" else AutoModelForSequenceClassification
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type=task)
    adapter = folder / "adapter"
    get_peft_model(auto.from_pretrained(model_folder), lora).save_pretrained(str(adapter))
    PreTrainedTokenizerFast.from_pretrained(model_folder).save_pretrained(adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    left = {name: tensor for name, tensor in weights.items() if "score" not in name}
    assert (len(left) < len(weights)) == (task == "SEQ_CLS")
    save_file(left, adapter / "adapter_model.safetensors")
    recipe = write_recipe(folder, "run", adapter)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", recipe])
    line = capsys.readouterr().err
    assert stopped.value.code == 2 and message in line and line.count("\n") == 1, line
