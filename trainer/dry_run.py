"""`rekatrain train --dry-run`: make every check that needs no weights, and print the recipe and one training row."""

import sys
from itertools import groupby

from rekatrain.data.chat import IGNORED_LABEL, render_completion
from rekatrain.trainer.recipe.load import Recipe, dump_recipe
from rekatrain.trainer.run_folder import RunFolder

TRAINED = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("[[", "]]")


def dry_run(recipe: Recipe, *, resume: bool) -> None:
    """Print the resolved recipe, counts of the data and the first row; write nothing and load no weights."""
    RunFolder(recipe.output_dir).check(recipe, resume=resume)
    print(dump_recipe(recipe))
    if recipe.stage == "sft":
        _show_sft(recipe)
    elif recipe.stage == "reward":
        _show_reward(recipe)
    else:
        _show_rloo(recipe)


def _show_sft(recipe: Recipe) -> None:
    from rekatrain.trainer.sft import prepare

    task = prepare(recipe)
    lengths = [len(row.input_ids) for row in task.rows]
    trained = sum(label != IGNORED_LABEL for row in task.rows for label in row.labels)
    print(f"# {len(task.rows)} rows, {sum(lengths):,} tokens, {trained:,} of them trained; longest row {max(lengths)}")
    first = task.rows[0]
    pairs = zip(first.labels, first.input_ids, strict=True)
    shown = ""
    for is_trained, part in groupby(pairs, lambda pair: pair[0] != IGNORED_LABEL):
        text = str(task.tokenizer.decode([token for _, token in part]))
        shown += f"{TRAINED[0]}{text}{TRAINED[1]}" if is_trained else text
    print(f"# the first row; trained tokens are marked\n{shown}")


def _show_reward(recipe: Recipe) -> None:
    from rekatrain.trainer.reward_model.train import prepare

    task = prepare(recipe)
    lengths = [len(row.input_ids) for pair in task.pairs for row in (pair.chosen, pair.rejected)]
    print(f"# {len(task.pairs)} pairs, {sum(lengths):,} tokens; longest answer with its prompt: {max(lengths)}")
    print(f"# {len(task.held_out)} pairs held out")
    first = task.pairs[0]
    for name, row in (("chosen", first.chosen), ("rejected", first.rejected)):
        print(f"# the first {name}\n{task.tokenizer.decode(row.input_ids)}")


def _show_rloo(recipe: Recipe) -> None:
    from rekatrain.trainer.rloo.setup import prepare

    task = prepare(recipe)
    config = task.config
    num_completions = config.prompts_per_step * config.num_generations
    print(
        f"# {len(task.prompts)} prompts; a step samples {config.prompts_per_step} x {config.num_generations} = "
        f"{num_completions} completions; {config.max_steps} steps pass over the prompts "
        f"{config.max_steps * config.prompts_per_step / len(task.prompts):.2f} times"
    )
    first = task.prompts[0]
    print(f"# the first prompt\n{first.text}{TRAINED[0]} ...a completion, sampled by the policy{TRAINED[1]}")
    response = first.row.messages[-1]
    if response["role"] == "assistant":
        text = render_completion(response.get("reasoning_content"), response["content"])
        columns = {name: [value] for name, value in first.row.columns.items()}
        with task.grader as grader:
            scores = grader.score(
                prompts=[first.text],
                completions=[text],
                completion_ids=[[]],
                columns=columns,
                judges=[first.row.source.rewards],
            )
        rewards = ", ".join(f"{name} {values[0]}" for name, values in scores.by_name.items())
        print(f"# rewards of its reference response: {rewards}\n{text}")
