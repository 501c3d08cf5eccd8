"""`rekatrain sample`: sample and score a few groups as a step does, and print them. Trains nothing."""

from collections.abc import Mapping, Sequence
from statistics import fmean, pstdev

import torch

from rekatrain.rewards.progress import Progress
from rekatrain.trainer.models.load import load_policy
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.rloo.group import Group, shape_rewards
from rekatrain.trainer.rloo.loss import leave_one_out_advantages
from rekatrain.trainer.rloo.metrics import idle_records
from rekatrain.trainer.rloo.rollouts import sample_groups, step_prompts
from rekatrain.trainer.rloo.setup import prepare
from rekatrain.trainer.run.completions_table import completions_table


def sample(recipe: Recipe, *, num_prompts: int, by_disagreement: bool = False) -> list[Group]:
    """Print the first prompts of the first step with completions, rewards and advantages (without a KL); return them.

    by_disagreement: print the completions of all prompts in the order of how much the rewards disagree, most first. A
                     reward that is being gamed likes completions that the others do not
    """
    setup = prepare(recipe)
    config = setup.config
    policy = load_policy(recipe)
    # transformers wraps `to` and loses its signature
    policy.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    chosen = step_prompts(
        len(setup.prompts),
        seed=recipe.seed,
        step=0,
        prompts_per_step=config.prompts_per_step,
        is_shuffled=setup.is_shuffled,
    )
    prompts = [setup.prompts[index] for index in chosen[:num_prompts]]
    with setup.grader:
        sampled = sample_groups(
            setup.make_sampler(policy),
            setup.grader,
            setup.tokenizer,
            prompts,
            range(len(prompts)),
            seed=recipe.seed,
            step=0,
            num_generations=config.num_generations,
            progress=Progress(max_steps=config.max_steps),
        )
    groups = [shape_rewards(group, config) for group in sampled]
    if by_disagreement:
        _print_by_disagreement(groups, {reward.name: reward.weight for reward in setup.rewards})
        return groups
    for group in groups:
        records = [
            {**record, "advantage": _advantage(group, index)} for index, record in enumerate(idle_records(0, [group]))
        ]
        print(completions_table(records, title=f"\n{group.prompt.row.where}", num_rows=len(records), num_lines=None))
    return groups


def disagreements(values: Mapping[str, Sequence[float | None]], weights: Mapping[str, float]) -> list[float]:
    """Disagreement of the rewards on each completion: the range of its standardized rewards, in standard deviations.

    A reward is standardized over the completions that have it, and negated if its weight is negative. A constant reward
    is left out.

    >>> disagreements({"a": [0, 0, 1, 1], "b": [0, 0, 1, 0]}, {"a": 1.0, "b": 1.0})[3] > 1
    True
    """
    num_completions = len(next(iter(values.values()), ()))
    standardized: list[list[float]] = [[] for _ in range(num_completions)]
    for name, of_reward in values.items():
        known = [value for value in of_reward if value is not None]
        deviation = pstdev(known) if known else 0.0
        for index, value in enumerate(of_reward):
            if value is not None and deviation:
                distance = (value - fmean(known)) / deviation
                standardized[index].append(-distance if weights.get(name, 1.0) < 0 else distance)
    return [max(of_completion, default=0.0) - min(of_completion, default=0.0) for of_completion in standardized]


def _print_by_disagreement(groups: Sequence[Group], weights: Mapping[str, float]) -> None:
    members = [(group, index) for group in groups for index in range(len(group.completions))]
    values = {name: [group.rewards_by_name[name][index] for group, index in members] for name in weights}
    ordered = sorted(zip(disagreements(values, weights), members, strict=True), key=lambda pair: -pair[0])
    for spread, (group, index) in ordered:
        print(f"\n=== disagreement {spread:.2f}, {group.prompt.row.where}, {_describe(group, index)}")
        print(f"{group.prompt.text}{group.texts[index]}")


def _advantage(group: Group, index: int) -> float:
    """Return a completion's advantage without a KL; 0 for one that is not in the loss."""
    of_group = leave_one_out_advantages(torch.tensor([group.compared_rewards]))[0]
    return of_group[index].item() if group.is_in_loss[index] else 0.0


def _describe(group: Group, index: int) -> str:
    completion = group.completions[index]
    advantage = _advantage(group, index)
    values = [f"{name} {of_reward[index]}" for name, of_reward in group.rewards_by_name.items()]
    failed = [f"{name} failed: {error}" for name, error in group.reward_errors[index].items()]
    return (
        f"{completion.finish_reason}, {len(completion.ids)} tokens, reward {group.rewards[index]:.4g} "
        f"({', '.join([*values, *failed])}), advantage {advantage:+.4g}"
    )
