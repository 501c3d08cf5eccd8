"""QLoRA of a reward model: trained on a base of four bits, resumed, scored as in training, and exported.

bitsandbytes computes on a CPU too, so that only the check for a GPU is left out here. Needs the extra `qlora`.
"""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from rekatrain.rewards.models.classifier import classify
from rekatrain.trainer.cli import main
from rekatrain.trainer.reward_model.model import load_reward_model
from rekatrain.trainer.reward_model.score_probe import read_scores
from tests.helpers.exports import servable_llama
from tests.helpers.reward_models import rewards_of
from tests.trainer.export.test_adapter_stages import train_and_resume, write_reward_recipe

FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
HEAD = "base_model.model.score.weight"


@pytest.fixture
def cpu_as_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute as bitsandbytes does on a GPU: its kernel for CPUs with bfloat16 rounds every layer's output."""
    modules = pytest.importorskip("bitsandbytes.nn.modules", reason="the extra qlora is not installed")
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)
    monkeypatch.setattr("rekatrain.trainer.reward_model.model.check_quantization_here", lambda recipe: None)
    monkeypatch.setattr("rekatrain.trainer.plan.memory.check_quantization", lambda recipe, **launch: None)


def scores_of(base: dict, checkpoint: Path, tokenizer: PreTrainedTokenizerFast) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the scores of a checkpoint's conversations: on its base as it is quantized now, and those of training."""
    sequences, expected = read_scores(checkpoint)
    options = base | {"pretrained_model_name_or_path": str(checkpoint)}
    model = load_reward_model(tokenizer, **options).eval()
    return classify(model, sequences, micro_batch_tokens=4096)[:, 0], expected


@pytest.mark.usefixtures("cpu_as_gpu")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "method",
    [
        "plain LoRA",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("DoRA, rsLoRA, patterns", "the head by its name")),
    ],
)
def test_qlora_reward_model_resumes_scores_and_exports(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, dtype: str, method: str
) -> None:
    path = write_reward_recipe(tmp_path, tokenizer, method)
    base = {"dtype": dtype, "quantization_config": FOUR_BITS}
    recipe = json.loads(path.read_text())
    recipe["model"] = {"pretrained_model_name_or_path": str(tmp_path / "model"), **base}
    path.write_text(json.dumps(recipe))
    # bitsandbytes packs blocks of 64 weights.
    servable_llama(tokenizer, intermediate_size=128).save_pretrained(tmp_path / "model")
    checkpoints = tmp_path / "run" / "checkpoints"
    trained = train_and_resume(path)
    assert HEAD in trained
    # Small updates of the adapter and of the head are not rounded away.
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}

    # The adapter and its head, on the base that is quantized anew, give the scores of the training process.
    scores, expected = scores_of(base, checkpoints / "checkpoint-3", tokenizer)
    assert_close(scores, expected, rtol=1e-4, atol=1e-5 if dtype == "float32" else 2e-2)
    assert (expected - read_scores(checkpoints / "checkpoint-1")[1]).abs().max() > 1e-2  # training has changed them

    # The export is the adapter, merged into the base that is not quantized.
    main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--dtype", "float32"])
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=1)
    merged = PeftModel.from_pretrained(whole, str(checkpoints / "checkpoint-3")).merge_and_unload()
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert_close(exported.state_dict(), merged.state_dict(), rtol=0, atol=0)
    assert torch.equal(exported.score.weight, trained[HEAD])
    assert all(isinstance(reward, float) for reward in rewards_of(tmp_path / "out", " It is 4. <sep>", " 4 <sep>"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_qlora_without_a_gpu_is_refused_by_name(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, no_weights: None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_reward_recipe(tmp_path, tokenizer, "plain LoRA")
    recipe = json.loads(path.read_text())
    recipe["model"]["quantization_config"] = FOUR_BITS
    path.write_text(json.dumps(recipe))
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(path), "--dry-run"])
    assert stopped.value.code == 2
    assert "model.quantization_config needs a GPU, and there is none" in capsys.readouterr().err
