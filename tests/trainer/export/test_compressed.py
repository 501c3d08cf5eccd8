"""`rekatrain export --quantize fp8|gptq|awq` by llmcompressor, which needs a separate environment.

LLMCOMPRESSOR_PYTHON=/path/to/llmcompressor/bin/python python -m pytest tests/trainer/export/test_compressed.py

AWQ is run by hand alone: it searches scales for minutes, and this tiny model loses more by it than is allowed.
"""

import json
import os
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from rekatrain.data.errors import InputError
from rekatrain.trainer.cli import main
from rekatrain.trainer.export import compressed
from tests.helpers.exports import servable_llama, train_run


def test_quantization_names_its_missing_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compressed, "find_spec", lambda name: None)
    for python in (sys.executable, str(tmp_path / "none"), "/bin/false"):
        monkeypatch.setenv(compressed.PYTHON, python)
        with pytest.raises(InputError, match=rf"--quantize awq needs the package llmcompressor, which '{python}'"):
            compressed.check_compressible(["awq"])


@pytest.mark.parametrize(("intermediate_size", "size"), [(256, 128), (19_648, 64), (96, 32), (100, None)])
def test_group_size_divides_the_inputs_of_all_layers(
    tokenizer: PreTrainedTokenizerFast, intermediate_size: int, size: int | None
) -> None:
    model = servable_llama(tokenizer, intermediate_size=intermediate_size)
    if size is not None:
        assert compressed.group_size(model) == size
    else:
        with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.down_proj has 100: use fp8"):
            compressed.group_size(model)


@pytest.mark.slow
@pytest.mark.skipif(compressed.PYTHON not in os.environ, reason=f"{compressed.PYTHON} names no python of llmcompressor")
def test_quantized_export_is_held_against_training(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerFast,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = train_run(tmp_path, tokenizer)
    for kind, num_bits in (("fp8", 8), ("gptq", 4)):
        with caplog.at_level("INFO"):
            main(["export", str(run), str(tmp_path / kind), "--quantize", kind])
        assert f"verified in a fresh process: {kind}, KL from training" in caplog.text
        config = json.loads((tmp_path / kind / "config.json").read_text())
        (group,) = config["quantization_config"]["config_groups"].values()
        assert group["weights"]["num_bits"] == num_bits
        assert f"quantized by llmcompressor ({kind})" in (tmp_path / kind / "README.md").read_text()
        assert (tmp_path / kind / "serving" / "vllm.sh").exists() and not (tmp_path / kind / "recipe.yaml").exists()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(["export", str(run), str(tmp_path / "never"), "--quantize", "fp8", "--max-kl", "1e-6"])
    assert stopped.value.code == 1
    line = capsys.readouterr().err
    assert "fp8 moves the distributions of training by a mean KL of" in line and "and 1e-06 is allowed" in line
    assert not (tmp_path / "never").exists() and not list(tmp_path.glob(".never*"))
