"""The task of learning.py: a tiny Llama writes the digits of a number in reverse."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rekatrain.data.chat import END_OF_TEXT
from rekatrain.data.rows import Row
from rekatrain.trainer.prompts import Prompt
from rekatrain.trainer.rloo.sampler.in_process import Sampler

LENGTHS = (2, 8)
MAX_COMPLETION_LENGTH = LENGTHS[1] + 2


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a tokenizer with one id per byte, and eos."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([END_OF_TEXT, *letters])}
    backend = Tokenizer(models.BPE(vocabulary, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT)


def make_prompts(tokenizer: PreTrainedTokenizerFast, count: int, seed: int) -> list[Prompt]:
    """Make prompts of two to eight digits to reverse."""
    random = np.random.default_rng(seed)
    texts = [
        "".join(str(digit) for digit in random.integers(10, size=length)) + "="
        for length in random.integers(LENGTHS[0], LENGTHS[1], size=count, endpoint=True)
    ]
    return [
        Prompt(text=text, ids=tokenizer(text)["input_ids"], row=Row(messages=[], columns={"answer": text[-2::-1]}))
        for text in texts
    ]


def is_reversed(completions: Sequence[str], answer: Sequence[str], **_: object) -> list[float | None]:
    """Return 1 for the exact answer that ends with eos, else 0."""
    return [float(text == right + END_OF_TEXT) for text, right in zip(completions, answer, strict=True)]


def make_start(tokenizer: PreTrainedTokenizerFast, goal: float, seed: int) -> tuple[Any, list[Any]]:
    """Train a model by supervision until its sampled accuracy is `goal` -> the model, and its accuracies by step."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    course: list[Any] = []
    while not course or course[-1][1] < goal:
        for number in range(20):
            batch = make_prompts(tokenizer, 128, seed=len(course) * 20 + number + (1 << 20))
            answers = tokenizer([prompt.row.columns["answer"] for prompt in batch])["input_ids"]
            ids = [torch.tensor(p.ids + a + [tokenizer.eos_token_id]) for p, a in zip(batch, answers, strict=True)]
            labels = [sequence.clone() for sequence in ids]
            for sequence, prompt in zip(labels, batch, strict=True):
                sequence[: len(prompt.ids)] = -100
            model(
                input_ids=torch.nn.utils.rnn.pad_sequence(ids, batch_first=True),
                labels=torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=-100),
            ).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        course.append(((len(course) + 1) * 20, accuracy(model, tokenizer)))
        if len(course) == 200:
            raise RuntimeError(f"supervision did not reach {goal}: {course[-1]}")
    return model, course


def accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, temperature: float = 1.0) -> float:
    """Return the accuracy of one answer to each of 512 held-out prompts."""
    prompts = make_prompts(tokenizer, 512, seed=1)
    sampler = make_sampler(model, tokenizer, temperature)
    groups = sampler.sample([prompt.ids for prompt in prompts], [(2, prompt_index) for prompt_index in range(512)], 1)
    return fmean(score(prompts, groups, tokenizer).flatten().tolist())


def make_sampler(model: Any, tokenizer: PreTrainedTokenizerFast, temperature: float = 1.0) -> Sampler:
    length = MAX_COMPLETION_LENGTH
    return Sampler(model, tokenizer, max_completion_length=length, temperature=temperature, batch_size=512)


def score(prompts: Sequence[Prompt], groups: Sequence[Any], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Return the rewards [P, G]."""
    return torch.tensor(
        [
            is_reversed([tokenizer.decode(c.ids) for c in group], [prompt.row.columns["answer"]] * len(group))
            for prompt, group in zip(prompts, groups, strict=True)
        ]
    )
