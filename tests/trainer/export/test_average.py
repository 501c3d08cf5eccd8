"""`export --average N`: the mean of the last checkpoints, held against a separate probe."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from rekatrain.trainer.cli import main
from tests.helpers.exports import write_sft_recipe


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, "lora=null"], ids=["adapter", "full"])
def test_average_is_the_mean_of_the_merged_checkpoints(tmp_path: Path, tokenizer, capsys, lora: str | None) -> None:
    recipe = write_sft_recipe(tmp_path, tokenizer)
    main(["train", str(recipe), "sft.max_steps=5", "sft.save_steps=1", *([lora] if lora else [])])
    main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--average", "3", "--checkpoint", "4"])
    models = []
    for step in (2, 3, 4):
        checkpoint = tmp_path / "run" / "checkpoints" / f"checkpoint-{step}"
        base = AutoModelForCausalLM.from_pretrained(checkpoint if lora else tmp_path / "model")
        models.append(base if lora else PeftModel.from_pretrained(base, str(checkpoint)).merge_and_unload())
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    states = [model.state_dict() for model in models]
    for name, tensor in exported.items():
        stacked = torch.stack([state[name] for state in states])
        assert torch.equal(tensor, stacked.double().mean(0).float()), name
    assert not torch.equal(
        exported["model.layers.0.self_attn.q_proj.weight"], states[-1]["model.layers.0.self_attn.q_proj.weight"]
    )
    assert "the mean of checkpoint-2, checkpoint-3, checkpoint-4" in (tmp_path / "out" / "README.md").read_text()

    for options, message in (
        (["--average", "9"], "--average 9: there are 5 checkpoints up to checkpoint-5"),
        *(
            []
            if lora
            else [(["--average", "2", "--as", "adapter"], "the mean of adapters is no adapter of their rank")]
        ),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(["export", str(tmp_path / "run"), str(tmp_path / "never"), *options])
        line = capsys.readouterr().err
        assert stopped.value.code == 2 and message in line and line.count("\n") == 1
