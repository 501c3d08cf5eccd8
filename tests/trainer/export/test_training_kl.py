"""GGUF files are held against distributions of the training process by a stated KL."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rekatrain.trainer.cli import main
from rekatrain.trainer.models.probe import PROBE_FILE, read_probe
from tests.helpers.exports import write_sft_recipe


@pytest.mark.slow
def test_gguf_is_held_against_the_training_process(
    tmp_path: Path, tokenizer, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_sft_recipe(tmp_path, tokenizer)
    main(["train", str(recipe), "sft.max_steps=2"])
    (checkpoint,) = (tmp_path / "run" / "checkpoints").iterdir()
    probe = read_probe(checkpoint)
    assert probe is not None and probe.nexts is not None
    logprobs, lengths = probe.nexts
    # Whole distributions, whose entries for the tokens of the text are the log-probabilities of the probe.
    assert logprobs.shape == (8, 320) and torch.allclose(logprobs.exp().sum(1), torch.ones(8), atol=1e-5)
    targets = probe.ids[0][lengths]
    assert torch.equal(
        logprobs.gather(1, targets[:, None])[:, 0].round(decimals=4), probe.logprobs[0][lengths - 1].round(decimals=4)
    )
    command = ["export", str(tmp_path / "run"), str(tmp_path / "out"), "--as", "gguf", "--quantize", "f32"]
    with pytest.raises(SystemExit):
        main([*command[:3], "--max-kl", "0.1"])
    assert "--max-kl 0.1 is the limit of a quantized export: add --quantize" in capsys.readouterr().err
    with caplog.at_level("INFO"):
        main(command)
    assert "from the training process (at most 1.0e-06)" in caplog.text

    tensors = load_file(checkpoint / PROBE_FILE)
    tensors["next_logprobs"] = (tensors["next_logprobs"] * 1.2).log_softmax(1)  # as if another model had been trained
    save_file(tensors, checkpoint / PROBE_FILE, metadata={"dtype": "float32"})
    (checkpoint / "manifest.json").unlink()  # which knows the old file
    command[1:3] = [str(checkpoint), str(tmp_path / "never")]
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(command)
    line = capsys.readouterr().err
    assert stopped.value.code == 1 and line.count("\n") == 1
    assert re.search("the KL from the training process is .* nats per token, above 1.01e-06", line)
    assert "--max-kl sets another limit" in line and not (tmp_path / "never").exists()
    main([*command, "--max-kl", "0.9"])
    assert (tmp_path / "never" / "model-f32.gguf").exists()
