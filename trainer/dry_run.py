"""`rekatrain train --dry-run`: make every check that needs no weights, and print the recipe and one training row."""

import sys
from itertools import groupby
from typing import TYPE_CHECKING

from rekatrain.data.chat import IGNORED_LABEL, render_completion
from rekatrain.trainer.recipe.load import Recipe, dump_recipe
from rekatrain.trainer.run.folder import RunFolder

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from rekatrain.trainer.reward_model.train import RewardTask
    from rekatrain.trainer.rloo.setup import RunSetup
    from rekatrain.trainer.sft import SFTTask

TRAINED = ("\033[32m", "\033[0m") if sys.stdout.isatty() else ("[[", "]]")


def dry_run(recipe: Recipe, *, resume: bool) -> None:
    """Print the resolved recipe, counts of the data and the first row; write nothing and load no weights.

    Raises InputError for all that `train` would find before it loads weights, except vLLM servers, which need not run
    yet.
    """
    folder = RunFolder(recipe.output_dir)
    folder.check(recipe, resume=resume)
    print(dump_recipe(recipe))
    if recipe.stage == "sft":
        _show_sft(recipe, folder, resume=resume)
    elif recipe.stage == "reward":
        _show_reward(recipe, folder, resume=resume)
    else:
        _show_rloo(recipe, folder, resume=resume)


def _check_trl_start(recipe: Recipe, folder: RunFolder, task: "SFTTask | RewardTask", *, resume: bool) -> None:
    from rekatrain.trainer.models.load import check_trainable
    from rekatrain.trainer.resume.fingerprints import take_fingerprints
    from rekatrain.trainer.resume.origin import check_origin
    from rekatrain.trainer.trl_stages.resharding import check_resumable

    config: TrainingArguments = task.config
    check_trainable(recipe, is_deepspeed=config.deepspeed_plugin is not None, bf16=config.bf16)
    checkpoint = folder.choose_checkpoint(resume=resume)
    if checkpoint is not None:
        check_resumable(checkpoint, recipe.stage, config)
        check_origin(recipe, take_fingerprints(recipe, task.trained_rows()), checkpoint)


def _check_rloo_start(recipe: Recipe, task: "RunSetup", folder: RunFolder, *, resume: bool) -> None:
    from rekatrain.trainer.models.load import check_trainable
    from rekatrain.trainer.processes.launch import read_launch
    from rekatrain.trainer.resume.fingerprints import take_fingerprints
    from rekatrain.trainer.resume.origin import check_origin
    from rekatrain.trainer.rloo.checkpoint import check_layout
    from rekatrain.trainer.rloo.distributed import check_zero, make_accelerator, zero_stage

    accelerator = make_accelerator(bf16=task.config.bf16, ddp_timeout=task.ddp_timeout(read_launch().num_processes))
    check_trainable(recipe, is_deepspeed=zero_stage(accelerator) > 0, bf16=task.config.bf16)
    check_zero(recipe, zero_stage(accelerator))
    task.config.prompts_per_process(accelerator.num_processes)
    checkpoint = folder.choose_checkpoint(resume=resume)
    if checkpoint is not None:
        check_layout(accelerator, checkpoint, restarts_optimizer=task.config.restart_optimizer)
        check_origin(recipe, take_fingerprints(recipe, task.trained_rows()), checkpoint)


def _show_sft(recipe: Recipe, folder: RunFolder, *, resume: bool) -> None:
    from rekatrain.trainer.sft import prepare

    task = prepare(recipe)
    _check_trl_start(recipe, folder, task, resume=resume)
    lengths = task.rows.lengths()
    trained = sum(int((labels != IGNORED_LABEL).sum()) for _, labels in task.rows.arrays())
    some = "the first " if task.stream is not None else ""
    print(
        f"# {some}{len(task.rows)} rows, {lengths.sum():,} tokens, {trained:,} of them trained; longest row "
        f"{lengths.max()}"
    )
    first = task.rows[0]
    pairs = zip(first.labels, first.input_ids, strict=True)
    shown = ""
    for is_trained, part in groupby(pairs, lambda pair: pair[0] != IGNORED_LABEL):
        text = str(task.tokenizer.decode([token for _, token in part]))
        shown += f"{TRAINED[0]}{text}{TRAINED[1]}" if is_trained else text
    print(f"# the first row; trained tokens are marked\n{shown}")


def _show_reward(recipe: Recipe, folder: RunFolder, *, resume: bool) -> None:
    from rekatrain.trainer.reward_model.train import prepare

    task = prepare(recipe)
    _check_trl_start(recipe, folder, task, resume=resume)
    lengths = [len(row.input_ids) for pair in task.pairs for row in (pair.chosen, pair.rejected)]
    print(f"# {len(task.pairs)} pairs, {sum(lengths):,} tokens; longest answer with its prompt: {max(lengths)}")
    print(f"# {len(task.held_out)} pairs held out")
    first = task.pairs[0]
    for name, row in (("chosen", first.chosen), ("rejected", first.rejected)):
        print(f"# the first {name}\n{task.tokenizer.decode(row.input_ids)}")


def _show_rloo(recipe: Recipe, folder: RunFolder, *, resume: bool) -> None:
    from rekatrain.trainer.check_rewards import describe_sample
    from rekatrain.trainer.rloo.setup import prepare

    task = prepare(recipe)
    _check_rloo_start(recipe, task, folder, resume=resume)
    config = task.config
    num_completions = config.prompts_per_step * config.num_generations
    print(
        f"# {len(task.prompts)} prompts; a step samples {config.prompts_per_step} x {config.num_generations} = "
        f"{num_completions} completions; {config.max_steps} steps pass over the prompts "
        f"{config.max_steps * config.prompts_per_step / len(task.prompts):.2f} times"
    )
    print(describe_sample(task.rewards, [prompt.row for prompt in task.prompts], task.scoring))
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
