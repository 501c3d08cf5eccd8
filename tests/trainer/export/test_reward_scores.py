"""The export of a reward model is held against scores that the training process saved."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rekatrain.trainer.cli import main
from rekatrain.trainer.reward_model.score_probe import FILE
from tests.helpers.exports import write_sft_recipe


@pytest.mark.slow
def test_reward_export_is_held_against_training(tmp_path: Path, tokenizer, caplog, capsys) -> None:
    path = write_sft_recipe(tmp_path, tokenizer)
    recipe = json.loads(path.read_text())
    pairs = [{"prompt": f"{n} + {n} =", "chosen": f"It is {2 * n}.", "rejected": f"{2 * n}"} for n in range(1, 5)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    recipe |= {"stage": "reward", "reward": {"max_steps": 2}}
    recipe["dataset"] = {"path": str(tmp_path / "pairs.jsonl"), "format": "preference"}
    del recipe["sft"]
    path.write_text(json.dumps(recipe))
    main(["train", str(path)])
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert load_file(checkpoint / FILE)["scores"].shape == (3,)
    with caplog.at_level("INFO"):
        main(["export", str(tmp_path / "run"), str(tmp_path / "out")])
    assert "of the training process" in caplog.text

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    base.model.norm.weight.data *= 1.5
    base.save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit) as stopped:
        main(["export", str(tmp_path / "run"), str(tmp_path / "never")])
    assert stopped.value.code == 2 and "is not the reward model that was trained" in capsys.readouterr().err
    assert not (tmp_path / "never").exists()
