"""The command line: `rekatrain COMMAND ...` or `python -m rekatrain COMMAND ...`.

A user's error is one line and exit status 2; any other exception is a bug of ours and shows its traceback. Each command
is a function of api.py or of the module that it imports when it runs.
"""

import argparse
import errno
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

from rekatrain.data.errors import INTERRUPTED, InputError, RunInterrupted, TrainingStopped
from rekatrain.rewards.errors import RewardError
from rekatrain.trainer import api
from rekatrain.trainer.arguments import make_parser
from rekatrain.trainer.processes.early_signals import interruptible_imports
from rekatrain.trainer.processes.launched import is_launched, leave_launch
from rekatrain.trainer.terminal import set_up_terminal

# A disk that is full, over its quota, read-only or failing is no bug of ours.
WRITE_ERRORS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; exit with status 2 and one line if its input is wrong."""
    parser = make_parser()
    options, others = parser.parse_known_args(arguments)
    if options.command is None:
        parser.print_help()
        return
    # argparse takes no `key=value` after an option that follows the recipe.
    if any(text.startswith("-") or "=" not in text for text in others) or (others and "overrides" not in options):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if others:
        options.overrides += others
    set_up_terminal()
    try:
        COMMANDS[options.command](options)
    except InputError as error:
        _fail(f"error: {error}", 2)
    except RunInterrupted as error:
        _fail(str(error), INTERRUPTED)
    except (RewardError, TrainingStopped) as error:  # with the traceback of a grader, which is the one that matters
        _fail(f"error: {error}", 1)
    except OSError as error:
        if error.errno not in WRITE_ERRORS:
            _fail_of_a_bug(error)
        hint = "; then go on with --resume" if options.command in ("train", "launch") else ""
        _fail(f"error: {error}: free space, or make the folder writable{hint}", 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except Exception as error:
        _fail_of_a_bug(error)


def _fail(message: str, status: int, *, details: str = "") -> NoReturn:
    """Print one line and exit; in a launch, one of the ranks that have it prints it."""
    if not is_launched():
        print(f"rekatrain: {message}", file=sys.stderr)
    else:
        from rekatrain.trainer.processes.failure import print_failure

        print_failure(message, status, details=details)
    sys.exit(status)


def _fail_of_a_bug(error: Exception) -> NoReturn:
    """Show a traceback; in a launch, once, with the rank."""
    if not is_launched():
        raise error
    details = "".join(traceback.format_exception(error))
    _fail(f"error: {type(error).__name__}: {str(error).partition(chr(10))[0]}", 1, details=details)


def _train(options: argparse.Namespace) -> None:
    with interruptible_imports():
        api.train(
            options.recipe,
            *options.overrides,
            resume=options.resume,
            dry_run=options.dry_run,
            skip_memory_check=options.skip_memory_check,
        )


def _launch(options: argparse.Namespace) -> None:
    leave_launch()
    with interruptible_imports():
        recipe = api.check_recipe(options.recipe, *options.overrides)
        from rekatrain.trainer.launch.launch import launch

        supervisor = launch(
            recipe,
            options.recipe,
            options.overrides,
            resume=options.resume,
            dry_run=options.dry_run,
            skip_memory_check=options.skip_memory_check,
        )
    sys.exit(supervisor.run() if supervisor else 0)


def _plan(options: argparse.Namespace) -> None:
    recipe = api.check_recipe(options.recipe, *options.overrides)
    from rekatrain.trainer.models.continued import continue_adapter
    from rekatrain.trainer.plan.plan import plan

    recipe = continue_adapter(recipe)
    is_fitting = plan(
        recipe,
        launch_file=options.launch,
        num_gpus=options.gpus,
        num_nodes=options.nodes,
        gpu_memory=options.gpu_memory,
        host_memory=options.host_memory,
        prompt_tokens=options.prompt_tokens,
        table=options.table,
        calibrated=options.calibrate,
        rates_file=options.rates,
    )
    sys.exit(0 if is_fitting else 1)


def _sample(options: argparse.Namespace) -> None:
    api.sample(
        options.recipe,
        *options.overrides,
        num_prompts=options.num_prompts,
        by_disagreement=options.by_disagreement,
    )


def _check_rewards(options: argparse.Namespace) -> None:
    check = api.check_rewards(
        options.recipe, *options.overrides, num_rows=options.num_rows, num_wrong=options.num_wrong
    )
    sys.exit(0 if check.is_sound else 1)


def _serve_rollouts(options: argparse.Namespace) -> None:
    recipe = api.check_recipe(options.recipe, *options.overrides)
    if recipe.stage != "rloo":
        raise InputError(f"stage {recipe.stage} has no rollouts: give serve-rollouts an rloo recipe")
    from rekatrain.trainer.models.continued import continue_adapter
    from rekatrain.trainer.rloo.sampler.vllm.serve import serve_rollouts

    serve_rollouts(
        continue_adapter(recipe),
        host=options.host,
        port=options.port,
        tensor_parallel_size=options.tensor_parallel_size,
        print_only=options.print,
    )


def _evaluate(options: argparse.Namespace) -> None:
    api.evaluate(options.recipe, *options.overrides, out=options.out)


def _compare(options: argparse.Namespace) -> None:
    api.compare(options.a, options.b, reward=options.reward, out=options.out)


def _report(options: argparse.Namespace) -> None:
    api.report(*options.runs, out=options.out, max_completions=options.max_completions)


def _generate(options: argparse.Namespace) -> None:
    api.generate(options.recipe, *options.overrides)


def _filter(options: argparse.Namespace) -> None:
    api.filter_prompts(options.recipe, *options.overrides)


def _export(options: argparse.Namespace) -> None:
    api.export(
        options.run_folder,
        options.out,
        checkpoint=options.checkpoint,
        form=options.form,
        dtype=options.dtype,
        quantize=options.quantize,
        max_kl=options.max_kl,
        max_shard_size=options.max_shard_size,
        average=options.average,
        push_to_hub=options.push_to_hub,
    )


def _chat(options: argparse.Namespace) -> None:
    from rekatrain.trainer.chat import chat

    chat(options.export, url=options.url, model=options.model)


def _recipes(options: argparse.Namespace) -> None:
    from rekatrain.trainer.recipe.shipped import write_recipes

    write_recipes(options.out)


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "train": _train,
    "launch": _launch,
    "plan": _plan,
    "sample": _sample,
    "generate": _generate,
    "filter": _filter,
    "check-rewards": _check_rewards,
    "serve-rollouts": _serve_rollouts,
    "evaluate": _evaluate,
    "compare": _compare,
    "report": _report,
    "export": _export,
    "chat": _chat,
    "recipes": _recipes,
}
