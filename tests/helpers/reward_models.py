"""Tiny reward models of both kinds, and their scores by the reward `reward_model`."""

from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, BertConfig, PreTrainedTokenizerFast

from rekatrain.rewards.errors import RewardError
from rekatrain.rewards.models.local import RewardModel
from tests.conftest import tiny_config


def save_encoder(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write a tiny BERT with two labels, and a tokenizer with `[CLS]` and `[SEP]` and no eos token."""
    with_marks = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(with_marks),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.3,
        pad_token_id=with_marks.pad_token_id,
        id2label={0: "rude", 1: "polite"},
    )
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    with_marks.save_pretrained(folder)


def save_decoder(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write a tiny Llama with one output, and a tokenizer without a pad token."""
    torch.manual_seed(0)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 128}
    config = tiny_config(tokenizer, initializer_range=0.3, num_labels=1, **sizes)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def rewards_of(folder: Path, *completions: str, **options: object) -> list[float | None | RewardError]:
    """Return the rewards of completions of one prompt by the reward model in `folder`."""
    reward = RewardModel(pretrained_model_name_or_path=str(folder), **options)
    reward.setup()
    return reward(prompts=["human: What is 2+2? <sep> assistant:"] * len(completions), completions=completions)
