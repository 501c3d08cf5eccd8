"""Graded answers to held-out prompts as JSON objects: sampled in this process, or asked of servers."""

import logging
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from rekatrain.data.chat import REASONING_CLOSE, REASONING_OPEN, encode_text
from rekatrain.data.errors import InputError, TrainingStopped
from rekatrain.data.stop import decode_completion
from rekatrain.rewards.errors import RewardError
from rekatrain.rewards.grader import Grader
from rekatrain.trainer.evaluation.servers import ServerSampler
from rekatrain.trainer.held_out_prompts import HeldOut
from rekatrain.trainer.prompts import Prompt
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.rloo.metrics import gold_of
from rekatrain.trainer.rloo.rollouts import reward_columns, sample_groups
from rekatrain.trainer.synthesis.in_process import load_sampler

logger = logging.getLogger(__name__)

Answer = dict[str, Any]  # a JSON object
# Of a prompt: its index and its reasoning budget.
Task = tuple[int, int | None]
# Requests to servers between two writes of the journal.
ASKED_AT_ONCE = 256


def sampled_answers(
    recipe: Recipe, held_out: HeldOut, grader: Grader, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task]
) -> Iterator[list[Answer]]:
    """Yield the answers of the recipe's model to some prompts at a time.

    Draws follow from the recipe's seed, the prompt's index and the answer's index alone, with any budget.
    """
    config = held_out.config
    make_sampler = load_sampler(recipe, tokenizer, config)
    at_once = max(1, config.per_device_generation_batch_size // config.num_generations)
    for budget, indices in _by_budget(tasks):
        sampler = make_sampler(reasoning_budget=tokens_of_budget(budget, tokenizer))
        for first in range(0, len(indices), at_once):
            chosen = indices[first : first + at_once]
            groups = sample_groups(
                sampler,
                grader,
                tokenizer,
                [held_out.prompts[index] for index in chosen],
                chosen,
                seed=recipe.seed,
                step=0,
                num_generations=config.num_generations,
            )
            yield [
                _answer(
                    group.prompt,
                    (group.prompt_index, budget),
                    index,
                    text=group.texts[index],
                    ids=completion.ids,
                    finish_reason=completion.finish_reason.value,
                    rewards={name: values[index] for name, values in group.rewards_by_name.items()},
                    errors=group.reward_errors[index],
                    tokenizer=tokenizer,
                )
                for group in groups
                for index, completion in enumerate(group.completions)
            ]


def served_answers(
    recipe: Recipe, held_out: HeldOut, grader: Grader, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Task]
) -> Iterator[list[Answer]]:
    """Yield the answers of the servers to some prompts at a time; a prompt with a failed request is left out.

    Raises InputError if no request of the first prompts is answered, and at the end TrainingStopped if some failed.
    """
    config = held_out.config
    sampler = ServerSampler(config, tokenizer, seed=recipe.seed)
    at_once = max(1, max(ASKED_AT_ONCE, 4 * config.concurrency) // config.num_generations)
    failures: list[RewardError] = []
    num_answered = 0
    for budget, indices in _by_budget(tasks):
        for first in range(0, len(indices), at_once):
            chosen = indices[first : first + at_once]
            prompts = [held_out.prompts[index] for index in chosen]
            replies = sampler.sample(prompts, tokens_of_budget(budget, tokenizer))
            failures += [reply for group in replies for reply in group if isinstance(reply, RewardError)]
            whole = [
                (index, prompt, [reply for reply in group if not isinstance(reply, RewardError)])
                for index, prompt, group in zip(chosen, prompts, replies, strict=True)
            ]
            whole = [(index, prompt, group) for index, prompt, group in whole if len(group) == config.num_generations]
            num_answered += len(whole)
            if failures and not num_answered:
                raise InputError(f"evaluate.base_url: no request was answered: {failures[0]}")
            members = [
                (index, prompt, number, reply) for index, prompt, group in whole for number, reply in enumerate(group)
            ]
            ids = [reply.ids or encode_text(reply.text, tokenizer) for *_, reply in members]
            scores = grader.score(
                prompts=[prompt.text for _, prompt, *_ in members],
                completions=[reply.text for *_, reply in members],
                completion_ids=ids,
                columns=reward_columns([prompt.row for _, prompt, *_ in members]),
                judges=[prompt.row.source.rewards for _, prompt, *_ in members],
            )
            yield [
                _answer(
                    prompt,
                    (index, budget),
                    number,
                    text=reply.text,
                    ids=ids[at],
                    finish_reason=reply.finish_reason.value,
                    rewards={name: values[at] for name, values in scores.by_name.items()},
                    errors=scores.errors[at],
                    tokenizer=tokenizer,
                )
                for at, (index, prompt, number, reply) in enumerate(members)
            ]
    if failures:
        raise TrainingStopped(
            f"{len(failures)} requests have failed, the last: {failures[-1]}; with --out, all other answers are kept: "
            "start the command again to go on"
        )


def tokens_of_budget(budget: int | None, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the tokens of a completion after which its reasoning is closed: the opening tag and the budget."""
    return None if budget is None else len(encode_text(f" {REASONING_OPEN}\n", tokenizer)) + budget


def _by_budget(tasks: Sequence[Task]) -> Iterator[tuple[int | None, list[int]]]:
    for budget in dict.fromkeys(budget for _, budget in tasks):
        yield budget, [index for index, of_task in tasks if of_task == budget]


def _answer(
    prompt: Prompt,
    task: Task,
    index: int,
    *,
    text: str,
    ids: Sequence[int],
    finish_reason: str,
    rewards: Mapping[str, float | None],
    errors: Mapping[str, str],
    tokenizer: PreTrainedTokenizerBase,
) -> Answer:
    prompt_index, budget = task
    return {
        "prompt_index": prompt_index,
        "index": index,
        **({} if budget is None else {"reasoning_budget": budget}),
        "row": prompt.row.where,
        "source": prompt.row.source.name,
        "prompt": prompt.text,
        "gold": gold_of(prompt.row),
        "completion": text,
        "num_tokens": len(ids),
        "num_thinking": count_thinking(ids, tokenizer),
        "finish_reason": finish_reason,
        "rewards": dict(rewards),
        "reward_errors": dict(errors),
    }


def count_thinking(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of tokens between the tags of the reasoning; 0 without any."""
    text = decode_completion(ids, tokenizer)
    before, opening, _ = text.partition(REASONING_OPEN)
    if not opening or before.strip():
        return 0
    end = len(ids)
    if REASONING_CLOSE in text:
        has_closed = partial(_contains, REASONING_CLOSE, ids, tokenizer)
        end = bisect_left(range(len(ids)), True, key=has_closed) - len(encode_text(f"\n{REASONING_CLOSE}", tokenizer))
    return max(0, end - len(encode_text(f" {REASONING_OPEN}\n", tokenizer)))


def _contains(tag: str, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, length: int) -> bool:
    return tag in decode_completion(ids[:length], tokenizer)
