"""Held-out accuracy of the recipe's model, with a 95 % interval and sampling settings of its own.

    rekatrain evaluate RECIPE [model.pretrained_model_name_or_path=FOLDER]

FOLDER may be a model, an export or a run folder. A prompt of `eval_dataset` that is also in `dataset` is left out.
"""

import json
import logging
import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge

from data.errors import InputError
from rewards.compose import build_reward_functions, check_columns
from rewards.grader import Grader, ScoringConfig
from trainer.models import check_attention, check_model, load_model, load_model_tokenizer
from trainer.prompts import Prompt, load_prompts, reward_columns
from trainer.recipe import Recipe
from trainer.rloo.rollouts import Group, sample_groups, score_groups
from trainer.rloo.sampler import Sampler

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What a recipe's `evaluate:` section can say.

    reward:                           the reward that decides: an answer is right where it gives exactly 1.0
    max_completion_length:            tokens after which an answer is cut off
    temperature:                      0 takes the most likely token
    per_device_generation_batch_size: answers sampled at the same time
    """

    reward: str = "math_answer"
    max_completion_length: Annotated[int, Ge(1)] = 512
    temperature: Annotated[float, Ge(0)] = 0.0
    per_device_generation_batch_size: Annotated[int, Ge(1)] = 64


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Right answers among those that could be graded, with the Wilson 95 % interval of their share."""

    num_right: int
    num_graded: int
    accuracy: float
    low: float
    high: float


def evaluate(recipe: Recipe, *, out: Path | None = None) -> Accuracy:
    """Answer each held-out prompt once, print the accuracy, and write all answers to `out` where it is given."""
    config = EvaluateConfig(**recipe.evaluate)
    if recipe.eval_dataset is None:
        raise InputError("the recipe has no eval_dataset section: name the held-out rows there")
    # The recipe's options for that reward hold here too; all its rewards are shown beside the one that decides.
    rewards = build_reward_functions({config.reward: None, **recipe.rewards})
    tokenizer = load_model_tokenizer(recipe)
    model_config = check_model(recipe, tokenizer)
    check_attention(model_config)
    prompts = load_prompts(recipe.eval_dataset, tokenizer, model_config, config.max_completion_length, "eval_dataset")
    trained_on = load_prompts(recipe.dataset, tokenizer, model_config, 0)
    prompts = _held_out(prompts, trained_on)
    check_columns(rewards, reward_columns([prompt.row for prompt in prompts]))

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
    slots = range(len(prompts))
    with Grader(rewards, ScoringConfig(**recipe.scoring)) as grader:
        sampled = sample_groups(sampler, grader, tokenizer, prompts, slots, seed=recipe.seed, step=0, num_generations=1)
        groups = score_groups(grader, tokenizer, sampled)

    accuracy = wilson_interval(
        num_right=sum(group.rewards_by_name[config.reward][0] == 1.0 for group in groups),
        num_graded=sum(group.rewards_by_name[config.reward][0] is not None for group in groups),
    )
    _report(recipe, config, groups, accuracy)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(_result(recipe, groups, accuracy), ensure_ascii=False, indent=1), encoding="utf-8")
    return accuracy


def wilson_interval(*, num_right: int, num_graded: int) -> Accuracy:
    """The Wilson score interval at 95 % (Wilson 1927), which stays inside [0, 1] and holds for small counts.

    >>> interval = wilson_interval(num_right=5, num_graded=10)
    >>> round(interval.low, 4), round(interval.high, 4)
    (0.2366, 0.7634)
    """
    if num_graded == 0:
        raise InputError("no held-out answer could be graded: the reward gave None to all of them")
    z = 1.959963984540054
    share = num_right / num_graded
    centre = share + z * z / (2 * num_graded)
    spread = z * math.sqrt(share * (1 - share) / num_graded + z * z / (4 * num_graded**2))
    scale = 1 + z * z / num_graded
    # At shares of 0 and 1 one end is the share itself, which rounding would step over.
    low, high = min((centre - spread) / scale, share), max((centre + spread) / scale, share)
    return Accuracy(num_right=num_right, num_graded=num_graded, accuracy=share, low=low, high=high)


def _held_out(prompts: list[Prompt], trained_on: list[Prompt]) -> list[Prompt]:
    seen = {prompt.text for prompt in trained_on}
    held_out = [prompt for prompt in prompts if prompt.text not in seen]
    if len(held_out) < len(prompts):
        logger.warning(
            "%d of %d eval prompts are in dataset too and left out", len(prompts) - len(held_out), len(prompts)
        )
    if not held_out:
        raise InputError("every prompt of eval_dataset is in dataset too: there is nothing held out")
    return held_out


def _report(recipe: Recipe, config: EvaluateConfig, groups: list[Group], accuracy: Accuracy) -> None:
    endings = Counter(group.completions[0].ending for group in groups)
    print(
        f"{recipe.model['pretrained_model_name_or_path']}: {config.reward} {accuracy.accuracy:.1%} "
        f"[{accuracy.low:.1%}, {accuracy.high:.1%}] ({accuracy.num_right} of {accuracy.num_graded}, "
        f"temperature {config.temperature:g}); ended by "
        + ", ".join(f"{ending} {count / len(groups):.0%}" for ending, count in endings.most_common())
    )


def _result(recipe: Recipe, groups: list[Group], accuracy: Accuracy) -> dict[str, Any]:
    answers = [
        {
            "row": group.prompt.row.where,
            "prompt": group.prompt.text,
            "completion": group.texts[0],
            "ending": group.completions[0].ending.value,
            "rewards": {name: values[0] for name, values in group.rewards_by_name.items()},
            "reward_errors": dict(group.reward_errors[0]),
        }
        for group in groups
    ]
    return {"model": recipe.model, "evaluate": recipe.evaluate, **asdict(accuracy), "answers": answers}
