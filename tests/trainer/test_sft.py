"""The SFT stage: the tokens that are trained, and packed rows that do not attend to each other."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import SFTTrainer

from rekatrain.data.chat import IGNORED_LABEL, parse_completion
from rekatrain.data.errors import InputError
from rekatrain.trainer import sft
from rekatrain.trainer.recipe.load import Recipe

CONVERSATION = [
    {"role": "user", "content": "17 + 25 ="},
    {"role": "assistant", "content": "42", "reasoning_content": "Ten and twenty are thirty."},
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Blue"},
]


def make_recipe(model_folder: Path, tmp_path: Path, **sections: dict) -> Recipe:
    rows = [{"messages": CONVERSATION}, {"messages": CONVERSATION[2:]}, {"messages": CONVERSATION[:2]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sections["sft"] = {"max_steps": 1, "gradient_checkpointing": False, **sections.get("sft", {})}
    return Recipe(
        stage="sft",
        output_dir=str(tmp_path / "run"),
        model={"pretrained_model_name_or_path": str(model_folder), "dtype": "float32"},
        dataset={"path": str(tmp_path / "rows.jsonl")},
        **sections,
    )


def trained_texts(task: sft.SFTTask) -> list[str]:
    return [task.tokenizer.decode([label for label in row.labels if label != IGNORED_LABEL]) for row in task.rows]


def test_prepare_makes_a_row_of_each_assistant_turn(model_folder: Path, tmp_path: Path) -> None:
    thought = " <reasoning>\nTen and twenty are thirty.\n</reasoning>\n\n42 <sep>"
    task = sft.prepare(make_recipe(model_folder, tmp_path))
    assert trained_texts(task) == [thought, " Blue <sep>", " Blue <sep>", thought]
    assert parse_completion(trained_texts(task)[0]).answer == "42"
    last = sft.prepare(make_recipe(model_folder, tmp_path, chat={"turns": "last", "end_of_turn": "sep_eos"}))
    assert trained_texts(last) == [" Blue <sep><|endoftext|>"] * 2 + [f"{thought}<|endoftext|>"]


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_packed_rows_have_the_losses_of_separate_rows(attention: str, model_folder: Path, tmp_path: Path) -> None:
    recipe = make_recipe(
        model_folder, tmp_path, sft={"packing": True, "max_length": 256, "per_device_train_batch_size": 1}
    )
    task = sft.prepare(recipe)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, attn_implementation=attention)
    rows = Dataset.from_list([{"input_ids": row.input_ids, "labels": row.labels} for row in task.rows])
    trainer = SFTTrainer(model=model, args=task.config, train_dataset=rows, processing_class=task.tokenizer)
    (batch,) = trainer.get_train_dataloader()
    assert batch["input_ids"].shape[0] == 1 and batch["input_ids"].numel() == sum(len(r.input_ids) for r in task.rows)
    with torch.no_grad():
        packed = trainer.compute_loss(trainer.model, dict(batch)).item()

    reference = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    total, count = 0.0, 0
    for row in task.rows:
        with torch.no_grad():
            logprobs = reference(torch.tensor([row.input_ids])).logits[0].log_softmax(dim=-1)
        for position, label in enumerate(row.labels):
            if label != IGNORED_LABEL:
                total -= logprobs[position - 1, label].item()
                count += 1
    assert packed == pytest.approx(total / count, abs=2e-5)


def losses(recipe: Recipe) -> list[float]:
    return [json.loads(line)["loss"] for line in (Path(recipe.output_dir) / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("packing", [False, True])
def test_streamed_rows_are_trained_and_resumed(packing: bool, model_folder: Path, tmp_path: Path) -> None:
    keys = {"logging_steps": 1, "save_steps": 2, "per_device_train_batch_size": 2, "packing": packing}
    keys |= {"lr_scheduler_type": "constant", "learning_rate": 0.01, "max_length": 64 if packing else None}

    def run(name: str, *, max_steps: int, resume: bool = False, num_rows: int = 30) -> list[float]:
        recipe = make_recipe(model_folder, tmp_path, sft={**keys, "max_steps": max_steps})
        rows = [
            [{"role": "user", "content": str(n)}, {"role": "assistant", "content": "x" * n}] for n in range(1, num_rows)
        ]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
        dataset = {**recipe.dataset, "streaming": True}
        changed = replace(recipe, output_dir=str(tmp_path / name), dataset=dataset)
        sft.train(changed, resume=resume)
        return losses(changed)

    whole = run("whole", max_steps=4)
    run("parts", max_steps=2)
    with pytest.raises(InputError, match="the rows are not those of the checkpoint"):
        run("parts", max_steps=4, resume=True, num_rows=31)
    assert run("parts", max_steps=4, resume=True) == whole
    if not packing:
        with pytest.raises(InputError, match="streaming needs sft.max_steps"):
            run("endless", max_steps=-1)
