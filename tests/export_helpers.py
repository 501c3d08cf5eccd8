"""A tiny model that speaks the Reka format, trained by the real command line: what the serving tests serve."""

import json
from pathlib import Path
from typing import Any

from conftest import tiny_llama
from openai import OpenAI
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from trainer.cli import main

QUESTION = [{"role": "human", "content": "3 + 3 ="}]
# What the model has learnt to say to it, by heart.
ANSWER = " <reasoning>\nTwice 3.\n</reasoning>\n\n6 <sep>"


def servable_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A random Llama with heads of 64, which vLLM has kernels for, and sizes that K-quants' blocks do not divide."""
    heads = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    return tiny_llama(tokenizer, intermediate_size=96, max_position_embeddings=2048, initializer_range=0.1, **heads)


def train_run(folder: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A LoRA run of 60 SFT steps in `folder`, on rows with a reasoning; the run's folder."""
    servable_llama(tokenizer).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": f"{n} + {n} =", "answer": 2 * n, "reasoning": f"Twice {n}."} for n in range(1, 7)]
    (folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "stage": "sft",
        "output_dir": str(folder / "run"),
        "model": {"pretrained_model_name_or_path": str(folder / "model"), "dtype": "float32"},
        "lora": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
        "dataset": {"path": str(folder / "sums.jsonl"), "format": "prompt_answer"},
        "sft": {"max_steps": 60, "per_device_train_batch_size": 6, "learning_rate": 1e-2, "logging_steps": 5},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    main(["train", str(folder / "recipe.yaml")])
    return folder / "run"


def ask(client: OpenAI, messages: list[dict[str, str]], *, model: str = "any", **options: Any) -> Any:
    """A greedy answer of a server, the stream of one where asked for; Any: the client's own types."""
    settings = {"max_tokens": 60, "temperature": 0, **options}
    return client.chat.completions.create(model=model, messages=messages, **settings)  # type: ignore[arg-type]
