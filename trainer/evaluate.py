"""`rekatrain evaluate`: held-out accuracy of the recipe's model, with 95 % intervals and its own sampling settings.

    rekatrain evaluate RECIPE [model.pretrained_model_name_or_path=FOLDER] --out FILE
    rekatrain evaluate RECIPE evaluate.base_url=http://localhost:8000/v1 evaluate.model=NAME
    accelerate launch --num_processes 8 -m rekatrain evaluate RECIPE --out FILE

FOLDER may be a model, an export or a run folder. Prompts of `eval_dataset` that are also in `dataset` are left out.
With --out, all answers are kept, and a second start goes on where the first one ended.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from rekatrain.data.errors import InputError
from rekatrain.rewards.grader import Grader
from rekatrain.rewards.scoring import ScoringConfig
from rekatrain.trainer.evaluation.answers import Answer, Task, sampled_answers, served_answers
from rekatrain.trainer.evaluation.figures import all_figures
from rekatrain.trainer.evaluation.journal import Journal
from rekatrain.trainer.evaluation.show import show_figures
from rekatrain.trainer.evaluation.votes import find_votes
from rekatrain.trainer.held_out_prompts import EvaluateConfig, HeldOut, prepare_held_out
from rekatrain.trainer.intervals import Accuracy
from rekatrain.trainer.models.config import check_attention
from rekatrain.trainer.models.load import check_model, load_model_tokenizer
from rekatrain.trainer.processes.failure import end_with_the_others
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.resume.fingerprints import take_fingerprints
from rekatrain.trainer.run.checkpoints import write_whole

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Evaluation(Accuracy):
    """The accuracy of the first answers, and all figures (evaluation/figures.py)."""

    figures: Mapping[str, Any] = field(default_factory=dict)


def evaluate(recipe: Recipe, *, out: Path | None = None) -> Evaluation:
    """Get answers to each held-out prompt, print the figures of them, and return them.

    The accuracy counts the first answer to each prompt only: its interval assumes independent answers. On several
    processes every process must call this; each gets answers to a part of the prompts.

    out: a JSON file for the figures and all answers
    """
    with end_with_the_others():
        return _evaluate(recipe, PartialState(), out)


def _evaluate(recipe: Recipe, state: PartialState, out: Path | None) -> Evaluation:
    tokenizer = load_model_tokenizer(recipe)
    model_config = check_model(recipe, tokenizer)
    if recipe.evaluate.get("base_url") is None:
        check_attention(model_config)
    elif state.num_processes > 1:
        raise InputError("evaluate.base_url: one process asks the servers: start rekatrain evaluate without a launcher")
    held_out = prepare_held_out(recipe, tokenizer, model_config, all_rewards=True)
    config = held_out.config

    # 1. Read the answers of an earlier start, and find what is missing.
    journal = Journal(out, _settings(recipe, held_out), state.process_index)
    answers = journal.read()
    tasks = _missing(held_out, answers)
    state.wait_for_everyone()
    journal.begin()
    if answers:
        logger.info("%d answers of an earlier start; %d prompts are left", len(answers), len(tasks))

    # 2. Get and grade the others, each process its part.
    source = sampled_answers if config.base_url is None else served_answers
    own: list[Answer] = []
    mine = tasks[state.process_index :: state.num_processes]
    if mine:
        with Grader(held_out.rewards, ScoringConfig(**recipe.scoring)) as grader:
            for some in source(recipe, held_out, grader, tokenizer, mine):
                journal.add(some)
                own += some
    answers += gather_object(own) if state.num_processes > 1 else own

    # 3. Compare answers with each other for the majority vote, and compute the figures.
    answers.sort(key=lambda a: (_budget_rank(config, a), a["prompt_index"], a["index"]))
    figures: dict[str, Any] | None = None
    if state.is_main_process:
        if config.num_generations > 1:
            _vote(answers, ScoringConfig(**recipe.scoring))
        figures = all_figures(answers, config.reward)
        show_figures(_model_name(recipe, config), config, figures)
        if out is not None:
            result = {"model": _model(recipe, config), "seed": recipe.seed, "evaluate": recipe.evaluate, **figures}
            out.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps({**result, "answers": answers}, ensure_ascii=False, indent=1)
            write_whole(out, text.encode(errors="backslashreplace"))
            journal.finish()
    # The main process has figures; the others get them.
    shared: dict[str, Any] = next(each for each in gather_object([figures]) if each is not None)
    keys = ("num_right", "num_graded", "accuracy", "low", "high")
    return Evaluation(**{key: shared[key] for key in keys}, figures=shared)


def _missing(held_out: HeldOut, answers: list[Answer]) -> list[Task]:
    known = {(answer["prompt_index"], answer.get("reasoning_budget")) for answer in answers}
    budgets = held_out.config.reasoning_budgets or [None]
    tasks = [(index, budget) for budget in budgets for index in range(len(held_out.prompts))]
    return [task for task in tasks if task not in known]


def _budget_rank(config: EvaluateConfig, answer: Answer) -> int:
    return (config.reasoning_budgets or [None]).index(answer.get("reasoning_budget"))


def _vote(answers: list[Answer], scoring: ScoringConfig) -> None:
    """Write the vote of each answer into it."""
    groups = [
        list(group)
        for _, group in groupby(answers, key=lambda answer: (answer.get("reasoning_budget"), answer["prompt_index"]))
    ]
    votes = find_votes([[answer["completion"] for answer in group] for group in groups], scoring)
    for group, of_group in zip(groups, votes, strict=True):
        for answer, vote in zip(group, of_group, strict=True):
            answer["vote"] = vote


def _settings(recipe: Recipe, held_out: HeldOut) -> dict[str, Any]:
    """Return all that an answer and its rewards depend on."""
    config = held_out.config
    prints = take_fingerprints(recipe, ((prompt.text, prompt.row.columns) for prompt in held_out.prompts))
    weights = {} if config.base_url else {"weights": f"{prints.architecture[:16]} {prints.base_weights}"}
    sampling = {
        key: value
        for key, value in vars(config).items()
        if key not in ("per_device_generation_batch_size", "base_url", "concurrency", "request_timeout", "max_retries")
    }
    rewards = {"rewards": recipe.rewards, "code of the rewards": prints.rewards}
    return {"model": _model(recipe, config), **weights, "seed": recipe.seed, **sampling, **rewards, "rows": prints.rows}


def _model(recipe: Recipe, config: EvaluateConfig) -> dict[str, Any]:
    return recipe.model if config.base_url is None else {"served": config.model}


def _model_name(recipe: Recipe, config: EvaluateConfig) -> str:
    return str(config.model if config.base_url else recipe.model["pretrained_model_name_or_path"])
