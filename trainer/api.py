"""The commands as functions: `from rekatrain import train, evaluate, export, sample`.

    run = train("recipes/smollm2/rloo.yaml", "rloo.max_steps=3", resume=True)
    result = evaluate("recipes/smollm2/rloo.yaml", f"model.pretrained_model_name_or_path={run}")
    export(run, "my-model")

They make the checks that the commands make, and raise InputError for whatever is wrong with their input. The command
line (cli.py) calls them too. They work in a script without a `__main__` guard, in a notebook and in a here-document.
"""

from __future__ import annotations

import logging
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rekatrain.data.errors import InputError
from rekatrain.trainer.launch.section import LAUNCHED
from rekatrain.trainer.recipe.durations import seconds_of
from rekatrain.trainer.recipe.load import Recipe, build_recipe, load_recipe
from rekatrain.trainer.run.places import check_new_file, check_parent
from rekatrain.trainer.terminal import set_up_terminal

if TYPE_CHECKING:
    from rekatrain.rewards.check.check import RewardCheck
    from rekatrain.trainer.compare import Comparison
    from rekatrain.trainer.evaluate import Evaluation
    from rekatrain.trainer.reward_model.measures import RewardEvaluation
    from rekatrain.trainer.rloo.group import Group

logger = logging.getLogger(__name__)

# Each function imports what it needs when it runs: torch takes seconds, and a wrong recipe should be reported at once.


def check_recipe(recipe: str | Path | Recipe, *overrides: str) -> Recipe:
    """Load a recipe, apply overrides such as `"rloo.beta=0.1"`, and check every section; InputError for a mistake."""
    set_up_terminal()
    checked = build_recipe(asdict(recipe), overrides) if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    from rekatrain.trainer.recipe.sections import check_sections

    check_sections(checked)
    return checked


def train(
    recipe: str | Path | Recipe,
    *overrides: str,
    resume: bool = False,
    dry_run: bool = False,
    skip_memory_check: bool = False,
) -> Path:
    """Run the recipe's stage (sft, reward or rloo) and return the run folder.

    resume:            go on from the newest checkpoint in output_dir; start where there is none
    dry_run:           check everything, print the resolved recipe and one row, and stop
    skip_memory_check: start even where the plan says that the run cannot fit
    """
    checked = check_recipe(recipe, *overrides)
    run = Path(checked.output_dir)
    from rekatrain.trainer.models.continued import continue_adapter
    from rekatrain.trainer.plan.plan import check_fits

    check_parent(run, "output_dir")
    checked = continue_adapter(checked)
    if checked.launch is not None and LAUNCHED not in os.environ and os.environ.get("RANK", "0") == "0":
        logger.info("the section launch: is for rekatrain launch: rekatrain train starts no server")
    check_fits(checked, is_overridden=skip_memory_check)
    if dry_run:
        from rekatrain.trainer.dry_run import dry_run as show

        show(checked, resume=resume)
        return run
    from rekatrain.trainer.processes.agreement import agree_on_recipe
    from rekatrain.trainer.processes.failure import end_with_the_others
    from rekatrain.trainer.processes.interruption import INTERRUPTION

    if checked.stage == "sft":
        from rekatrain.trainer.sft import train as run_stage
    elif checked.stage == "reward":
        from rekatrain.trainer.reward_model.train import train as run_stage
    else:
        from rekatrain.trainer.rloo.train import train as run_stage
    agree_on_recipe(checked, resume=resume)
    with INTERRUPTION.listen(seconds_of(checked.time_limit)), end_with_the_others():
        run_stage(checked, resume=resume)
    if os.environ.get("RANK", "0") == "0":
        logger.info("run folder: %s; next: rekatrain export %s OUT", run, run)
    return run


def evaluate(
    recipe: str | Path | Recipe, *overrides: str, out: str | Path | None = None
) -> Evaluation | RewardEvaluation:
    """Measure the recipe's model on `eval_dataset`, print the result and return it.

    The model may be a folder, a hub id, an export or a run folder. A recipe of stage `reward` gives a RewardEvaluation.

    out: a JSON file for the result and every answer
    """
    checked = check_recipe(recipe, *overrides)
    if out is not None:
        out = Path(out)
        check_new_file(out, "--out")
    if checked.stage == "reward":
        from rekatrain.trainer.reward_model.evaluate_pairs import evaluate as evaluate_reward_model

        return evaluate_reward_model(checked, out=out)
    from rekatrain.trainer.evaluate import evaluate as evaluate_policy

    return evaluate_policy(checked, out=out)


def sample(
    recipe: str | Path | Recipe, *overrides: str, num_prompts: int = 2, by_disagreement: bool = False
) -> list[Group]:
    """Roll out groups for the first prompts of the run, print them with their rewards, and return them; train nothing.

    by_disagreement: print the completions on which the rewards disagree most first
    """
    checked = check_recipe(recipe, *overrides)
    if checked.stage != "rloo":
        raise InputError(f"stage {checked.stage} samples nothing: give sample an rloo recipe")
    from rekatrain.trainer.rloo.sample_command import sample as sample_policy

    return sample_policy(checked, num_prompts=num_prompts, by_disagreement=by_disagreement)


def compare(a: str | Path, b: str | Path, *, reward: str | None = None, out: str | Path | None = None) -> Comparison:
    """Compare two files that `evaluate` wrote, print the paired difference, and return it.

    reward: the deciding reward; that of A by default
    out:    a JSON file for the result and all rows that changed
    """
    set_up_terminal()
    if out is not None:
        check_new_file(Path(out), "--out")
    from rekatrain.trainer.compare import compare as compare_files

    return compare_files(Path(a), Path(b), reward=reward, out=None if out is None else Path(out))


def report(*runs: str | Path, out: str | Path, max_completions: int = 100_000) -> Path:
    """Write one HTML file about runs and evaluations, print a line about it, and return its path.

    runs:            run folders, running ones too, and files that `evaluate` wrote
    max_completions: of more, the file has an even sample of whole groups
    """
    set_up_terminal()
    check_new_file(Path(out), "--out")
    from rekatrain.trainer.report.report import write_report

    print(write_report([Path(run) for run in runs], Path(out), max_completions=max_completions))
    return Path(out)


def generate(recipe: str | Path | Recipe, *overrides: str) -> Path:
    """Sample, score and keep completions as the recipe's `generate:` says; return the file of SFT rows."""
    checked = check_recipe(recipe, *overrides)
    from rekatrain.trainer.synthesis.generate import generate as generate_rows

    return generate_rows(checked)


def filter_prompts(recipe: str | Path | Recipe, *overrides: str) -> Path:
    """Keep the prompts whose pass rate lies in the range of the recipe's `filter:`; return the file of their rows."""
    checked = check_recipe(recipe, *overrides)
    from rekatrain.trainer.synthesis.filter import filter_prompts as filter_rows

    return filter_rows(checked)


def check_rewards(
    recipe: str | Path | Recipe, *overrides: str, num_rows: int | None = None, num_wrong: int = 200
) -> RewardCheck:
    """Score the right answer of every row by the recipe's own rewards, and wrong ones; print the result and return it.

    num_rows:  rows to check, evenly spread over the data set; None: all of them
    num_wrong: rows of each source and reward to which wrong answers are made
    """
    checked = check_recipe(recipe, *overrides)
    from rekatrain.trainer.check_rewards import check_rewards as check

    return check(checked, num_rows=num_rows, num_wrong=num_wrong)


def export(
    run: str | Path,
    out: str | Path,
    *,
    checkpoint: str | None = None,
    form: Literal["merged", "adapter", "gguf"] = "merged",
    dtype: Literal["float32", "bfloat16"] | None = None,
    quantize: list[str] | None = None,
    max_kl: float | None = None,
    max_shard_size: str = "5GB",
    average: int = 1,
    push_to_hub: str | None = None,
) -> Path:
    """Write a run's newest weights, or one checkpoint's, as a folder that serves, verify it, and return the folder.

    checkpoint:     of the run folder: "best", or a step; the newest by default
    form:           merged, for transformers and vLLM; adapter, the LoRA adapter alone; gguf, for llama.cpp
    dtype:          of the stored weights; the recipe's by default
    quantize:       types of GGUF files to write, such as ["q8_0"]; or of a merged model ["fp8"], ["gptq"] or ["awq"]
    max_kl:         largest mean KL of a quantized export from training, in nats per token; by its type by default
    max_shard_size: of one weights file
    push_to_hub:    OWNER/NAME of a repository of the hub into which the folder is uploaded, too
    average:        number of checkpoints, up to that one, whose mean is exported
    """
    set_up_terminal()
    check_parent(Path(out), "OUT")
    from rekatrain.trainer.export.export import export as export_run
    from rekatrain.trainer.run.best import resolve_checkpoint

    if push_to_hub is not None:
        from rekatrain.trainer.export.hub import check_hub

        check_hub(push_to_hub)
    source = Path(run) if checkpoint is None else resolve_checkpoint(Path(run), checkpoint)
    options: dict[str, Any] = {"dtype": dtype, "quantize": quantize, "max_kl": max_kl}
    options |= {"max_shard_size": max_shard_size, "average": average}
    export_run(source, Path(out), form=form, **options)
    if push_to_hub is not None:
        from rekatrain.trainer.export.hub import push

        logger.info("uploaded to %s", push(Path(out), push_to_hub))
    return Path(out)
