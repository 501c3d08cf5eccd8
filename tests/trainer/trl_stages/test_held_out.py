"""The held-out loss of SFT: exact means over trained tokens, whatever the batches, the sources and the processes."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from rekatrain.data.chat import IGNORED_LABEL, EncodedRow, encode_row
from rekatrain.trainer.cli import main
from rekatrain.trainer.run.records import read_records
from rekatrain.trainer.trl_stages.held_out import batches, measure_held_out


def make_rows(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[EncodedRow]:
    return [
        encode_row([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}], tokenizer)
        for text in texts
    ]


def sums(model: LlamaForCausalLM, rows: list[EncodedRow]) -> tuple[float, int, int]:
    """Return the summed loss, the right tokens and the trained tokens, one row and one token at a time."""
    loss, right, count = 0.0, 0, 0
    for row in rows:
        with torch.no_grad():
            logprobs = model(torch.tensor([row.input_ids])).logits[0].double().log_softmax(dim=1)
        for position, label in enumerate(row.labels):
            if label != IGNORED_LABEL:
                loss -= logprobs[position - 1, label].item()
                right += int(logprobs[position - 1].argmax()) == label
                count += 1
    return loss, right, count


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_measure_held_out_gives_means_over_tokens(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, batch_size: int
) -> None:
    sources = {"long": make_rows(tokenizer, ["a b c d e f g" * 5, "Blue."]), "short": make_rows(tokenizer, ["4", "42"])}
    model.train()
    metrics = measure_held_out(model, sources, Accelerator(cpu=True), batch_size=batch_size)
    assert model.training
    model.eval()
    by_source = {name: sums(model, rows) for name, rows in sources.items()}
    by_source[""] = tuple(map(sum, zip(*by_source.values(), strict=True)))
    for name, (loss, right, count) in by_source.items():
        prefix = f"eval_{name}_" if name else "eval_"
        assert metrics[f"{prefix}loss"] == pytest.approx(loss / count, rel=1e-6)
        assert metrics[f"{prefix}mean_token_accuracy"] == right / count
        assert metrics[f"{prefix}num_tokens"] == count


@pytest.mark.parametrize(("num_rows", "num_processes"), [(1, 3), (5, 2), (7, 3), (8, 4)])
def test_batches_hold_each_row_once_in_equal_passes(
    tokenizer: PreTrainedTokenizerFast, num_rows: int, num_processes: int
) -> None:
    rows = make_rows(tokenizer, ["x" * (number + 1) for number in range(num_rows)])
    parts = [list(batches(rows, process, num_processes, 2)) for process in range(num_processes)]
    assert len({len(part) for part in parts}) == 1
    counted = [row for part in parts for batch in part for row, counts in batch if counts]
    assert sorted(len(row.input_ids) for row in counted) == sorted(len(row.input_ids) for row in rows)


@pytest.mark.parametrize("packing", [False, True])
def test_sft_measures_held_out_rows_while_it_trains(
    tmp_path: Path, model_folder: Path, tokenizer: PreTrainedTokenizerFast, packing: bool
) -> None:
    rows = [{"prompt": f"{n} + {n} =", "answer": str(2 * n)} for n in range(1, 9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:6]))
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[6:]))
    recipe = {
        "stage": "sft",
        "output_dir": str(tmp_path / "run"),
        "model": {"pretrained_model_name_or_path": str(model_folder), "dtype": "float32"},
        "dataset": {"path": str(tmp_path / "rows.jsonl"), "format": "prompt_answer"},
        "eval_dataset": {"path": str(tmp_path / "held.jsonl"), "format": "prompt_answer"},
        "sft": {
            **{"max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1},
            **{"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True, "save_steps": 2, "packing": packing},
        },
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    main(["train", str(tmp_path / "recipe.yaml")])
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    evaluated = {record["step"]: record for record in records if "eval_loss" in record}
    assert list(evaluated) == [0, 2, 4]
    assert not any("eval_loss" in record and "grad_norm" in record for record in records)
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4]
    held = [
        encode_row(
            [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["answer"]}], tokenizer
        )
        for row in rows[6:]
    ]
    for step, folder in ((0, model_folder), (2, None), (4, None)):
        model = AutoModelForCausalLM.from_pretrained(folder or tmp_path / "run" / "checkpoints" / f"checkpoint-{step}")
        loss, right, count = sums(model, held)
        assert evaluated[step]["eval_loss"] == pytest.approx(loss / count, rel=1e-5)
        assert evaluated[step]["eval_mean_token_accuracy"] == right / count
    assert evaluated[4]["eval_loss"] < evaluated[0]["eval_loss"]
