"""Completions of the recipe's model, sampled in this process."""

from collections.abc import Iterator, Sequence

import torch
from transformers import PreTrainedTokenizerBase

from rekatrain.data.stop import decode_completion
from rekatrain.trainer.models.load import load_model
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.rloo.sampler.in_process import Sampler
from rekatrain.trainer.synthesis.config import SynthesisConfig
from rekatrain.trainer.synthesis.journal import Answer, Journal
from rekatrain.trainer.synthesis.requests import Question, missing


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
    model = load_model(**recipe.model)
    # transformers wraps `to` and loses its signature
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    sampler = Sampler(
        model,
        tokenizer,
        max_completion_length=config.max_completion_length,
        temperature=config.temperature,
        batch_size=config.per_device_generation_batch_size,
        top_p=config.top_p,
        top_k=config.top_k,
    )
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
