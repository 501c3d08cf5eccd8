"""Held-out accuracy of the recipe's model, with a 95 % interval and sampling settings of its own.

    rekatrain evaluate RECIPE [model.pretrained_model_name_or_path=FOLDER]

FOLDER may be a model, an export or a run folder. A prompt of `eval_dataset` that is also in `dataset` is left out.
"""

import json
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import torch
from annotated_types import Ge
from rekatrain.data.errors import InputError
from rekatrain.rewards.compose import build_reward_functions, check_columns
from rekatrain.rewards.grader import Grader, ScoringConfig
from rekatrain.trainer.models import check_attention, check_model, load_model, load_model_tokenizer
from rekatrain.trainer.prompts import Prompt, load_prompts, reward_columns
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.rloo.rollouts import Group, sample_groups, score_groups
from rekatrain.trainer.rloo.sampler.in_process import Sampler

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What a recipe's `evaluate:` section can say.

    reward:                           the reward that decides: an answer is right where it gives exactly 1.0
    max_completion_length:            tokens after which an answer is cut off
    temperature:                      0 takes the most likely token
    num_generations:                  answers to each prompt; more than one also gives pass@k
    per_device_generation_batch_size: answers sampled at the same time
    """

    reward: str = "math_answer"
    max_completion_length: Annotated[int, Ge(1)] = 512
    temperature: Annotated[float, Ge(0)] = 0.0
    num_generations: Annotated[int, Ge(1)] = 1
    per_device_generation_batch_size: Annotated[int, Ge(1)] = 64

    def __post_init__(self) -> None:
        if self.num_generations > 1 and self.temperature == 0:
            raise InputError(
                f"evaluate.num_generations {self.num_generations} at temperature 0 gives one answer so many times: "
                "set evaluate.temperature"
            )


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """Right answers among those that could be graded, with the Wilson 95 % interval of their share."""

    num_right: int
    num_graded: int
    accuracy: float
    low: float
    high: float


def evaluate(recipe: Recipe, *, out: Path | None = None) -> Accuracy:
    """Answer each held-out prompt, print accuracy and pass@k, and write all answers to `out` where it is given.

    The accuracy is that of the first answers, so that its interval is one of independent answers.
    """
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
        sampled = sample_groups(
            sampler,
            grader,
            tokenizer,
            prompts,
            slots,
            seed=recipe.seed,
            step=0,
            num_generations=config.num_generations,
        )
        groups = score_groups(grader, tokenizer, sampled)

    given = [group.rewards_by_name[config.reward] for group in groups]
    accuracy = wilson_interval(
        num_right=sum(values[0] == 1.0 for values in given),
        num_graded=sum(values[0] is not None for values in given),
    )
    _report(recipe, config, groups, accuracy)
    passes = pass_rates(given) if config.num_generations > 1 else {}
    if passes:
        print("  " + ", ".join(f"pass@{k} {rate:.1%}" for k, rate in passes.items()))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        result = _result(recipe, groups, accuracy, passes)
        out.write_text(json.dumps(result, ensure_ascii=False, indent=1), encoding="utf-8")
    return accuracy


def pass_at_k(num_answers: int, num_right: int, k: int) -> float:
    """Chance that k of a prompt's answers, drawn without replacement, hold a right one: 1 - C(n - c, k) / C(n, k).

    Unbiased for the chance that k fresh answers hold one (Chen et al., arXiv 2107.03374).

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    return 1 - math.comb(num_answers - num_right, k) / math.comb(num_answers, k)


def pass_rates(given: Sequence[Sequence[float | None]]) -> dict[int, float]:
    """pass@1, 2, 4 and so on, up to the answers to a prompt; each the mean over prompts with so many graded answers.

    given: for each prompt, what the deciding reward gave its answers: 1.0 is right, None is not graded
    """
    counts = [(sum(value is not None for value in values), values.count(1.0)) for values in given]
    most = max(num_answers for num_answers, _ in counts)
    powers = [2**exponent for exponent in range(most.bit_length())]
    return {
        k: fmean(pass_at_k(num_answers, num_right, k) for num_answers, num_right in counts if num_answers >= k)
        for k in sorted({*powers, most})
        if k
    }


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
    endings = Counter(completion.finish_reason for group in groups for completion in group.completions)
    print(
        f"{recipe.model['pretrained_model_name_or_path']}: {config.reward} {accuracy.accuracy:.1%} "
        f"[{accuracy.low:.1%}, {accuracy.high:.1%}] ({accuracy.num_right} of {accuracy.num_graded}, "
        f"temperature {config.temperature:g}); ended by "
        + ", ".join(f"{ending} {count / endings.total():.0%}" for ending, count in endings.most_common())
    )


def _result(recipe: Recipe, groups: list[Group], accuracy: Accuracy, passes: dict[int, float]) -> dict[str, Any]:
    answers = [
        {
            "row": group.prompt.row.where,
            "prompt": group.prompt.text,
            "completion": text,
            "finish_reason": completion.finish_reason.value,
            "rewards": {name: values[place] for name, values in group.rewards_by_name.items()},
            "reward_errors": dict(group.reward_errors[place]),
        }
        for group in groups
        for place, (completion, text) in enumerate(zip(group.completions, group.texts, strict=True))
    ]
    return {
        "model": recipe.model,
        "evaluate": recipe.evaluate,
        **asdict(accuracy),
        "pass_at": passes,
        "answers": answers,
    }
