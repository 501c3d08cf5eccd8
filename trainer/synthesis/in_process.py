"""Completions of the recipe's model, sampled in this process."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase

from rekatrain.data.stop import decode_completion
from rekatrain.trainer.models.load import load_model
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.rloo.sampler.in_process import Sampler
from rekatrain.trainer.synthesis.config import SynthesisConfig
from rekatrain.trainer.synthesis.journal import Answer, Journal
from rekatrain.trainer.synthesis.requests import Question, missing


class Sampling(Protocol):
    """The settings that the sections `generate`, `filter` and `evaluate` have in common."""

    @property
    def max_completion_length(self) -> int: ...
    @property
    def temperature(self) -> float: ...
    @property
    def per_device_generation_batch_size(self) -> int: ...


def load_sampler(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, config: Sampling) -> Callable[..., Sampler]:
    """Load the recipe's model onto this process's device; return a constructor of samplers, for their other options."""
    model = load_model(**recipe.model)
    device = PartialState().device if torch.cuda.is_available() else torch.device("cpu")
    # transformers wraps `to` and loses its signature
    model.to(device)  # type: ignore[arg-type]
    return partial(
        Sampler,
        model,
        tokenizer,
        max_completion_length=config.max_completion_length,
        temperature=config.temperature,
        batch_size=config.per_device_generation_batch_size,
    )


def sample_answers(
    recipe: Recipe,
    config: SynthesisConfig,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    journal: Journal,
) -> Iterator[list[Question]]:
    """Sample the missing completions, write them to the journal, and yield the questions that are complete.

    The draws follow from the recipe's seed, the prompt and the index of the completion alone.
    """
    sampler = load_sampler(recipe, tokenizer, config)(top_p=config.top_p, top_k=config.top_k)
    at_once = max(1, config.per_device_generation_batch_size // config.num_generations)
    for first in range(0, len(questions), at_once):
        chunk = questions[first : first + at_once]
        # 4: not the streams of a training run, which begin with 0 to 3
        keys = [(4, recipe.seed, int(question.name, 16)) for question in chunk]
        groups = sampler.sample([question.prompt.ids for question in chunk], keys, config.num_generations)
        for question, group in zip(chunk, groups, strict=True):
            for index in missing(question, config.num_generations, journal):
                completion = group[index]
                answer = Answer(
                    text=decode_completion(completion.ids, tokenizer),
                    finish_reason=completion.finish_reason,
                    prompt_tokens=len(question.prompt.ids),
                    completion_tokens=len(completion.ids),
                    ids=completion.ids,
                )
                journal.add_answer((question.name, index), answer)
        yield list(chunk)
