"""A base that names more eos ids than its tokenizer: an export names the tokenizer's, which training knows, alone."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from rekatrain.data.chat import encode_text
from rekatrain.trainer.cli import main
from tests.helpers.exports import QUESTION, write_sft_recipe

FORMS = ["merged", "adapter"]


@pytest.fixture(scope="module")
def exports(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a base that also ends at `6`, the answer that it learns; and its exports."""
    folder = tmp_path_factory.mktemp("eos")
    recipe = write_sft_recipe(folder, tokenizer)
    (six,) = encode_text("6", tokenizer)
    ids = [tokenizer.eos_token_id, six]
    for name in ("config.json", "generation_config.json"):
        path = folder / "model" / name
        path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": ids}))
    main(["train", str(recipe)])
    for form in FORMS:
        main(["export", str(folder / "run"), str(folder / form), "--as", form])
    return folder


@pytest.mark.slow
def test_all_files_name_the_tokenizers_eos(exports: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    eos = tokenizer.eos_token_id
    assert json.loads((exports / "merged" / "config.json").read_text())["eos_token_id"] == eos
    for form in FORMS:  # vLLM reads this one, by default or by --generation-config .
        assert GenerationConfig.from_pretrained(exports / form).eos_token_id == eos
    assert "--generation-config ." in (exports / "adapter" / "serving" / "vllm.sh").read_text()
    for form in FORMS:
        assert AutoTokenizer.from_pretrained(exports / form).eos_token_id == eos


@pytest.mark.parametrize("form", FORMS)
def test_transformers_goes_on_after_the_bases_other_eos(exports: Path, form: str, monkeypatch, capsys) -> None:
    base = AutoModelForCausalLM.from_pretrained(exports / "model")
    assert len(base.generation_config.eos_token_id) == 2
    script = exports / form / "serving" / "transformers_chat.py"
    monkeypatch.setattr(sys, "argv", [str(script), QUESTION[0]["content"]])
    model = runpy.run_path(str(script), run_name="__main__")["model"]
    assert "6" in capsys.readouterr().out
    assert model.generation_config.eos_token_id == 0
    ids = torch.tensor([[5, 6, 7]])
    only_six = torch.full((1, model.config.vocab_size), -1e4)
    only_six[0, encode_text("6", AutoTokenizer.from_pretrained(exports / form))[0]] = 0
    output = model.generate(ids, max_new_tokens=4, do_sample=False, logits_processor=[lambda _, scores: only_six])
    assert output.shape[1] == 7
