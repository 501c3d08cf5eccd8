"""`rekatrain evaluate`: held-out accuracy of the recipe's model, with a 95 % interval and its own sampling settings.

    rekatrain evaluate RECIPE [model.pretrained_model_name_or_path=FOLDER]

FOLDER may be a model, an export or a run folder. Prompts of `eval_dataset` that are also in `dataset` are left out.
"""

import json
import logging
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from rekatrain.rewards.grader import Grader, ScoringConfig
from rekatrain.trainer.held_out_prompts import EvaluateConfig, prepare_held_out
from rekatrain.trainer.intervals import Accuracy, pass_rates, wilson_interval
from rekatrain.trainer.models.load import check_attention, check_model, load_model, load_model_tokenizer
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.rloo.group import Group
from rekatrain.trainer.rloo.rollouts import sample_groups
from rekatrain.trainer.rloo.sampler.in_process import Sampler

logger = logging.getLogger(__name__)


def evaluate(recipe: Recipe, *, out: Path | None = None) -> Accuracy:
    """Sample answers to each held-out prompt, print accuracy and pass@k, and return the accuracy.

    The accuracy counts the first answer to each prompt only: the interval assumes independent answers.

    out: a JSON file for the result and all answers
    """
    tokenizer = load_model_tokenizer(recipe)
    model_config = check_model(recipe, tokenizer)
    check_attention(model_config)
    held_out = prepare_held_out(recipe, tokenizer, model_config, all_rewards=True)
    config, prompts = held_out.config, held_out.prompts

    model = load_model(**recipe.model)
    # transformers wraps `to` and loses its signature
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    sampler = Sampler(
        model,
        tokenizer,
        max_completion_length=config.max_completion_length,
        temperature=config.temperature,
        batch_size=config.per_device_generation_batch_size,
    )
    prompt_indices = range(len(prompts))
    with Grader(held_out.rewards, ScoringConfig(**recipe.scoring)) as grader:
        groups = sample_groups(
            sampler,
            grader,
            tokenizer,
            prompts,
            prompt_indices,
            seed=recipe.seed,
            step=0,
            num_generations=config.num_generations,
        )

    scores = [group.rewards_by_name[config.reward] for group in groups]
    accuracy = wilson_interval(
        num_right=sum(values[0] == 1.0 for values in scores),
        num_graded=sum(values[0] is not None for values in scores),
    )
    _report(recipe, config, groups, accuracy)
    passes = pass_rates(scores) if config.num_generations > 1 else {}
    if passes:
        print("  " + ", ".join(f"pass@{k} {rate:.1%}" for k, rate in passes.items()))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        result = _result(recipe, groups, accuracy, passes)
        out.write_text(json.dumps(result, ensure_ascii=False, indent=1), encoding="utf-8")
    return accuracy


def _report(recipe: Recipe, config: EvaluateConfig, groups: list[Group], accuracy: Accuracy) -> None:
    finish_reasons = Counter(completion.finish_reason for group in groups for completion in group.completions)
    print(
        f"{recipe.model['pretrained_model_name_or_path']}: {config.reward} {accuracy.accuracy:.1%} "
        f"[{accuracy.low:.1%}, {accuracy.high:.1%}] ({accuracy.num_right} of {accuracy.num_graded}, "
        f"temperature {config.temperature:g}); finish reasons: "
        + ", ".join(f"{reason} {count / finish_reasons.total():.0%}" for reason, count in finish_reasons.most_common())
    )


def _result(recipe: Recipe, groups: list[Group], accuracy: Accuracy, passes: dict[int, float]) -> dict[str, Any]:
    answers = [
        {
            "row": group.prompt.row.where,
            "prompt": group.prompt.text,
            "completion": text,
            "finish_reason": completion.finish_reason.value,
            "rewards": {name: values[index] for name, values in group.rewards_by_name.items()},
            "reward_errors": dict(group.reward_errors[index]),
        }
        for group in groups
        for index, (completion, text) in enumerate(zip(group.completions, group.texts, strict=True))
    ]
    return {
        "model": recipe.model,
        "evaluate": recipe.evaluate,
        **asdict(accuracy),
        "pass_at": passes,
        "answers": answers,
    }
