"""`rekatrain sample`: a few groups rolled out and judged as a step would, for a person to read. Trains nothing."""

import torch

from trainer.models import load_policy
from trainer.prompts import step_prompts
from trainer.recipe import Recipe
from trainer.rloo.objective import leave_one_out_advantages
from trainer.rloo.rollouts import sample_groups, score_groups
from trainer.rloo.task import prepare


def sample(recipe: Recipe, *, num_prompts: int) -> None:
    """Print the first prompts of the run's first step with their completions, rewards and advantages (without a KL)."""
    task = prepare(recipe)
    config = task.config
    policy = load_policy(recipe)
    # transformers wraps `to` and loses its signature
    policy.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    sampler = task.make_sampler(policy)
    chosen = step_prompts(len(task.prompts), seed=recipe.seed, step=0, prompts_per_step=config.prompts_per_step)
    prompts = [task.prompts[place] for place in chosen[:num_prompts]]
    slots = range(len(prompts))
    sampled = sample_groups(
        sampler,
        task.grader,
        task.tokenizer,
        prompts,
        slots,
        seed=recipe.seed,
        step=0,
        num_generations=config.num_generations,
    )
    for group in score_groups(task.grader, task.tokenizer, sampled):
        print(f"\n=== {group.prompt.row.where}\n{group.prompt.text}")
        advantages = leave_one_out_advantages(torch.tensor([group.rewards]))[0].tolist()
        for place, (completion, text) in enumerate(zip(group.completions, group.texts, strict=True)):
            given = ", ".join(f"{name} {values[place]}" for name, values in group.rewards_by_name.items())
            print(
                f"--- {completion.ending}, {len(completion.ids)} tokens, reward {group.rewards[place]:.4g} ({given}), "
                f"advantage {advantages[place]:+.4g}\n{text}"
            )
