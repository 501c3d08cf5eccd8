"""Tokenizers and models of other families: handled in all stages, or rejected by name before any weight."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from rekatrain.data.chat import encode_prompt, encode_row, encode_text, render_prompt
from rekatrain.data.errors import InputError
from rekatrain.data.families import TEXTS
from rekatrain.data.stop import StopSearch, decode_completion
from rekatrain.data.tokenizer import load_tokenizer
from rekatrain.trainer import sft as sft_stage
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.rloo.setup import prepare
from rekatrain.trainer.rloo.train import train
from tests.conftest import CORPUS, write_jsonl
from tests.helpers.families import FAMILIES, GEMMA_2, GEMMA_3, Family

MESSAGES = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "Yes"}]


def save(family: Family, folder: Path) -> str:
    model, tokenizer = family.build()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", FAMILIES)
def test_family_encodes_a_row_as_it_samples_one(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    published = family.tokenizer()
    published.save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    row = encode_row(MESSAGES, tokenizer)
    prompt = render_prompt(MESSAGES[:1])
    prompt_ids = encode_prompt(prompt, tokenizer)
    trained = [label for label in row.labels if label != -100]
    assert row.input_ids == prompt_ids + trained
    assert prompt_ids[: len(prompt_ids) - len(encode_text(prompt, tokenizer))] == (
        [published.bos_token_id] if family.has_bos else []
    )
    assert decode_completion(trained, tokenizer) == " Yes <sep>"
    assert StopSearch(tokenizer).cut([*trained, *trained]) == trained
    for text in TEXTS:
        assert decode_completion(encode_text(text, tokenizer), tokenizer) == text
    # what a run saves is read as the same tokenizer, also by transformers alone
    tokenizer.save_pretrained(tmp_path / "saved")
    for again in (load_tokenizer(str(tmp_path / "saved")), AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert encode_row(MESSAGES, again) == row


def test_sentencepiece_rows_have_one_space_mark(tmp_path: Path) -> None:
    FAMILIES["llama-2"].tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    trained = [label for label in encode_row(MESSAGES, tokenizer).labels if label != -100]
    assert tokenizer.convert_ids_to_tokens(trained)[:2] == ["▁Yes", "▁"]


@pytest.mark.parametrize("name", ["llama-2", "llama-3", "mistral", "qwen-2.5", "qwen-3", "gemma", "phi-3", "smollm"])
def test_family_is_sampled_and_trained_alike(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("rows.jsonl"), {"prompt": "2+2?"}, {"prompt": "17 + 25 ="})
    recipe = rloo_recipe(save(FAMILIES[name], tmp_path / "model"))
    train(recipe, resume=False)
    (metrics,) = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert metrics["mismatch_logprob"] < 1e-4
    starts = {FAMILIES[name].tokenizer().bos_token_id} if FAMILIES[name].has_bos else set()
    prompts = prepare(recipe).prompts
    assert all((prompt.ids[0] in starts) == bool(starts) for prompt in prompts)


@pytest.mark.parametrize("name", [*FAMILIES, "gemma-2", "gemma-3"])
def test_family_is_trained_by_sft_on_its_own_ids(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    family = (FAMILIES | {"gemma-2": GEMMA_2, "gemma-3": GEMMA_3})[name]
    model = save(family, tmp_path / "model")
    write_jsonl(Path("rows.jsonl"), {"prompt": "2+2?", "answer": "Yes"})
    sft = {"max_steps": 3, "per_device_train_batch_size": 1, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 3}
    sections = {"sft": sft, "rloo": {}, "rewards": {}, "scoring": {}}
    sft_stage.train(rloo_recipe(model, stage="sft", **sections), resume=False)
    losses = [json.loads(line)["loss"] for line in Path("run/metrics.jsonl").read_text().splitlines()]

    # the first loss, by transformers alone: the family's bos token, the prompt, and labels on the turn
    tokenizer = load_tokenizer(model)
    prompt = encode_text("human: 2+2? <sep> assistant:", tokenizer)
    trained = encode_text(" Yes <sep>", tokenizer)
    before = [*([family.tokenizer().bos_token_id] if family.has_bos else []), *prompt]
    labels = torch.tensor([[-100] * len(before) + trained])
    with torch.no_grad():
        reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        expected = reference(input_ids=torch.tensor([before + trained]), labels=labels).loss.item()
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    assert losses[2] < losses[0]


def rloo_recipe(model: str, **sections: Any) -> Recipe:
    rloo = {"max_steps": 1, "prompts_per_step": 2, "num_generations": 2, "max_completion_length": 8}
    parts: dict[str, Any] = {
        "stage": "rloo",
        "output_dir": "run",
        "model": {"pretrained_model_name_or_path": model, "dtype": "float32"},
        "dataset": {"path": "rows.jsonl", "format": "prompt_answer"},
        "rewards": {"reasoning_format": None},
        "scoring": {"num_workers": 1},
        "rloo": rloo,
    }
    return Recipe(**{**parts, **sections})


def test_other_attention_is_rejected_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("rows.jsonl"), {"prompt": "2+2?"})
    with pytest.raises(InputError, match="config.json has (sliding_window|attn_logit_softcapping)"):
        prepare(rloo_recipe(save(GEMMA_2, tmp_path / "model")))


def lower_case() -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet)
    backend.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def test_tokenizer_that_changes_text_is_rejected(tmp_path: Path) -> None:
    lower_case().save_pretrained(tmp_path)
    with pytest.raises(InputError, match="it changes text"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("space", [True, False])
def test_byte_level_prefix_space_is_removed(space: bool, tmp_path: Path) -> None:
    tokenizer = FAMILIES["qwen-3"].tokenizer()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["pre_tokenizer"]["pretokenizers"][-1]["add_prefix_space"] = space
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(backend))
    tokenizer.save_pretrained(tmp_path)
    ids = encode_text("Yes", load_tokenizer(str(tmp_path)))
    assert load_tokenizer(str(tmp_path)).decode(ids) == "Yes"
    assert torch.tensor(ids).numel() > 0
