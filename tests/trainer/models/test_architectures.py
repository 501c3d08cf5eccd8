"""Architectures unlike Llama: a plan, or one line that names the reason, from the config alone."""

import json
from pathlib import Path

import pytest
import transformers
from transformers import PreTrainedTokenizerFast

from rekatrain.trainer.cli import main
from tests.helpers.families import SIZES

EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
ROUTED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4}
# Name of the config's class -> its further keys; a few layers are dense in DeepSeek.
MIXTURES: dict[str, dict] = {
    "Qwen3MoeConfig": {"head_dim": 8, "decoder_sparse_step": 1},
    "Qwen2MoeConfig": {"shared_expert_intermediate_size": 16},
    "MixtralConfig": {"sliding_window": None},
    "DeepseekV3Config": LATENT | ROUTED,
    "GptOssConfig": {"head_dim": 8},
    "GraniteMoeConfig": {},
    "Llama4TextConfig": {"head_dim": 8, "intermediate_size_mlp": 48},
    "Glm4MoeConfig": {"head_dim": 8, **ROUTED},
    "OlmoeConfig": {},
    "PhimoeConfig": {},
}
OTHERS: dict[str, tuple[dict, str, str]] = {
    "GPT2Config": ({"n_embd": 32, "n_layer": 2, "n_head": 4}, "sft", ""),
    "GPTNeoXConfig": ({}, "rloo", ""),
    "OPTConfig": ({"ffn_dim": 48, "word_embed_proj_dim": 32}, "rloo", ""),
    "GemmaConfig": ({"head_dim": 8}, "rloo", ""),
    "Gemma2Config": ({"head_dim": 8}, "sft", ""),
    "Gemma3TextConfig": ({"head_dim": 8}, "rloo", "config.json has sliding_window 4096"),
    "Lfm2Config": ({"layer_types": ["conv", "full_attention"]}, "rloo", "config.json has layer_types conv: sampling"),
    "FalconConfig": ({}, "sft", ""),
    "StableLmConfig": ({}, "rloo", "StableLmForCausalLM (model_type stablelm) computes its attention by code of its"),
    "BloomConfig": (
        {"max_position_embeddings": None},
        "sft",
        "(model_type bloom) has no max_position_embeddings: models without a context length",
    ),
    "MambaConfig": ({"max_position_embeddings": None}, "sft", "(model_type mamba) has no max_position_embeddings"),
    "NemotronConfig": (
        {},
        "rloo",
        "the code of model_type nemotron, an architecture that nobody has tried",
    ),
    "CTRLConfig": ({"n_positions": 256}, "sft", "CTRLLMHeadModel does not support activation checkpointing"),
    "BertConfig": ({}, "sft", "(model_type bert) is an encoder, whose tokens see those after them"),
    "ModernBertConfig": ({}, "reward", ""),
    "T5Config": ({"d_model": 32}, "reward", "(model_type t5) is an encoder with a decoder"),
    "BartConfig": ({"d_model": 32}, "reward", "(model_type bart) is an encoder with a decoder"),
}


def plan_of(
    folder: Path, tokenizer: PreTrainedTokenizerFast, name: str, keys: dict, stage: str, lora: dict | None
) -> int:
    """Return the exit status of the plan of a model that has no weights."""
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    getattr(transformers, name)(**{**SIZES, "vocab_size": len(tokenizer), **ids, **keys}).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = {"max_steps": 1, "per_device_train_batch_size": 1, "max_length": 64}
    if stage == "rloo":
        settings = {"max_steps": 1, "prompts_per_step": 2, "num_generations": 2, "max_completion_length": 8}
    recipe = {
        "stage": stage,
        "output_dir": "run",
        "model": {"pretrained_model_name_or_path": str(folder), "dtype": "float32"},
        "lora": lora,
        "dataset": {"path": "rows.jsonl", "format": "preference" if stage == "reward" else "prompt_answer"},
        "rewards": {"reasoning_format": None} if stage == "rloo" else {},
        stage: settings,
    }
    (folder / "plan.yaml").write_text(json.dumps(recipe))
    with pytest.raises(SystemExit) as stopped:
        main(["plan", str(folder / "plan.yaml"), "--gpus", "1"])
    return int(stopped.value.code or 0)


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize(
    ("stage", "lora"), [("sft", {"r": 4, "target_modules": "all-linear"}), ("rloo", None)], ids=["sft", "rloo"]
)
def test_mixture_of_experts_is_refused_by_name(
    tmp_path: Path, tokenizer, capsys: pytest.CaptureFixture[str], name: str, stage: str, lora: dict | None
) -> None:
    assert plan_of(tmp_path, tokenizer, name, EXPERTS | MIXTURES[name], stage, lora) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and "Traceback" not in line
    is_other = "config.json has" in line  # several have windows, too, which RLOO refuses first
    assert ("is a mixture of experts" in line and "experts" in line) or (stage == "rloo" and is_other), line


@pytest.mark.parametrize("name", OTHERS)
def test_other_architecture_is_planned_or_refused_in_one_line(
    tmp_path: Path, tokenizer, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    keys, stage, message = OTHERS[name]
    status = plan_of(tmp_path, tokenizer, name, keys, stage, None)
    shown = capsys.readouterr()
    if message:
        assert status == 2 and message in shown.err and shown.err.count("\n") == 1
    else:
        assert status == 0 and "fits" in shown.out
