"""vLLM, started by an exported reward model's own script, scores as `reward_model` does. Slow: two servers.

VLLM_PYTHON=/path/to/vllm/bin/python python -m pytest -m vllm tests/vllm/test_reward_model.py
"""

import asyncio
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from rekatrain.data.chat import render_prompt
from rekatrain.rewards.errors import RewardError
from rekatrain.rewards.models.local import RewardModel
from rekatrain.rewards.models.remote import RemoteRewardModel
from rekatrain.trainer.cli import main
from tests.helpers.exports import servable_llama, serve_by_vllm

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif("VLLM_PYTHON" not in os.environ, reason="VLLM_PYTHON names no python that has vLLM"),
]
# It does not end with the eos token. If that is the pad token too, transformers scores the token before it, vLLM it.
CHAT_TEMPLATE = "{% for m in messages %}<|endoftext|>{{ m.role }}: {{ m.content }}\n{% endfor %}"
CONTEXT = 128
QUESTION = [{"role": "user", "content": "What is 2+2?"}]
ROUNDS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "17 + 25 ="},
]
CASES = [
    (QUESTION, " 4 <sep>"),
    (QUESTION, " <reasoning>\nTwo and two.\n</reasoning>\n\nfour, I think <sep>"),
    (QUESTION, " cut off in the"),
    (QUESTION, ""),
    (QUESTION, "\n\n  white   space\n\tand a line \n <sep>"),
    (ROUNDS, " Grüße, 你好 \U0001f642 x[0] < y <sep>"),
    (QUESTION, " so" * CONTEXT + " long <sep>"),
]


@dataclass(frozen=True, kw_only=True)
class Served:
    """An exported reward model and the url of its server."""

    folder: Path
    url: str


def bert(tokenizer: PreTrainedTokenizerFast) -> BertModel:
    """Return a random encoder without a classifier, with attention heads of 32, for which vLLM has kernels."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = BertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
    )
    return BertModel(config)


def save_base(folder: Path, kind: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write a base model whose tokenizer adds special tokens, as those of BERT and Llama 3 do."""
    backend = tokenizer.backend_tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    if kind == "encoder":
        marks = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
        inputs = ["input_ids", "token_type_ids", "attention_mask"]  # as BertTokenizer has them
        own = PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=inputs, **marks)
        framed, pair = "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"
        added = [(name, own.convert_tokens_to_ids(name)) for name in ("[CLS]", "[SEP]")]
        model = bert(own)
    else:
        own = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>")
        framed, pair = "<|endoftext|> $A", "<|endoftext|> $A $B:1"
        added = [("<|endoftext|>", own.eos_token_id)]
        model = servable_llama(own)
        model.config.max_position_embeddings = CONTEXT
    own.backend_tokenizer.post_processor = TemplateProcessing(single=framed, pair=pair, special_tokens=added)
    own.chat_template = CHAT_TEMPLATE
    model.save_pretrained(folder)
    own.save_pretrained(folder)


@pytest.fixture(scope="module", params=["decoder", "encoder"])
def served(
    request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """A reward model, trained and exported by the real commands, on a server."""
    folder = tmp_path_factory.mktemp("reward")
    save_base(folder / "model", request.param, tokenizer)
    rows = [{"prompt": f"{n} + {n} =", "chosen": f"It is {2 * n}.", "rejected": f"{2 * n}"} for n in range(1, 9)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "stage": "reward",
        "output_dir": str(folder / "run"),
        "model": {"pretrained_model_name_or_path": str(folder / "model"), "dtype": "float32"},
        "dataset": {"path": str(folder / "pairs.jsonl"), "format": "preference"},
        "reward": {"max_steps": 8, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "logging_steps": 4},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    main(["train", str(folder / "recipe.yaml")])
    main(["export", str(folder / "run"), str(folder / "reward")])
    with serve_by_vllm(folder / "reward", folder) as url:
        yield Served(folder=folder / "reward", url=url)


def score_here(**options: object) -> list[float | None | RewardError]:
    reward = RewardModel(**options)
    reward.setup()
    prompts = [render_prompt(messages) for messages, _ in CASES]
    return reward(prompts=prompts, completions=[completion for _, completion in CASES])


def score_there(**options: object) -> list[float | None | RewardError]:
    prompts = [render_prompt(messages) for messages, _ in CASES]
    reward = RemoteRewardModel(**options, max_retries=0)
    return asyncio.run(reward(prompts=prompts, completions=[completion for _, completion in CASES]))


def assert_equal(there: list, here: list) -> None:
    """Assert equality up to float32's rounding, and errors only for texts that are too long or empty."""
    *there, long = there
    assert isinstance(long, RewardError) and "context length" in str(long)
    here = here[:-1]
    assert [isinstance(value, RewardError) for value in there] == [isinstance(value, RewardError) for value in here]
    assert sum(isinstance(value, RewardError) for value in here) <= 1
    values = [(a, b) for a, b in zip(there, here, strict=True) if isinstance(b, float)]
    assert [a for a, _ in values] == pytest.approx([b for _, b in values], abs=1e-5)


def test_export_snippets_give_the_same_rewards(served: Served) -> None:
    def options(name: str) -> dict:
        (section,) = YAML(typ="safe").load(served.folder / "serving" / f"{name}.yaml")["rewards"].values()
        return {key: value for key, value in section.items() if key != "weight"}  # an option of the grader

    here = score_here(**options("reward_model"))
    there = score_there(**options("remote_reward_model") | {"url": served.url})
    assert_equal(there, here)
    assert len({round(value, 3) for value in here}) == len(CASES)


@pytest.mark.parametrize("reasoning", [False, True])
@pytest.mark.parametrize(
    ("route", "template"),
    [
        ("classify", "reka"),
        ("classify", "answer"),
        ("classify", "chat_template"),
        ("pooling", "reka"),
        ("pooling", "chat_template"),
        ("score", "pair"),
    ],
)
def test_route_scores_as_its_template_does_here(served: Served, route: str, template: str, reasoning: bool) -> None:
    options = {} if route == "score" else {"template": template}
    here = score_here(
        pretrained_model_name_or_path=str(served.folder), template=template, reasoning=reasoning, mean=0.0, std=1.0
    )
    assert_equal(score_there(url=served.url, route=route, reasoning=reasoning, **options), here)
