"""The command line: `rekatrain COMMAND ...` or `python -m rekatrain COMMAND ...`.

A user's error is one line and exit status 2; any other exception is a bug of ours and shows its traceback. Each command
is a function of api.py or of the module that it imports when it runs.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import rekatrain
from rekatrain.data.errors import InputError
from rekatrain.rewards.errors import RewardError
from rekatrain.trainer import api
from rekatrain.trainer.export.gguf_type_names import GGUF_TYPES
from rekatrain.trainer.terminal import set_up_terminal

EXAMPLES = """\
examples:
  rekatrain recipes my-recipes                               write the shipped recipes into a folder of yours
  rekatrain train my-recipes/smollm2/rloo.yaml --dry-run     check everything, load no weights
  rekatrain train my-recipes/smollm2/rloo.yaml rloo.max_steps=100
  accelerate launch --config_file my-recipes/accelerate/zero3.yaml -m rekatrain train RECIPE
  rekatrain COMMAND --help                                   show a command's options
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; exit with status 2 and one line if its input is wrong."""
    parser = _parser()
    options, others = parser.parse_known_args(arguments)
    if "run" not in options:
        parser.print_help()
        return
    # argparse takes no `key=value` after an option that follows the recipe.
    if any(text.startswith("-") or "=" not in text for text in others) or (others and "overrides" not in options):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if others:
        options.overrides += others
    set_up_terminal()
    try:
        options.run(options)
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"rekatrain: error: {error}", file=sys.stderr)
        sys.exit(2)
    except RewardError as error:  # its text includes the grader's traceback, which is the one that matters
        print(f"rekatrain: error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        is_training = options.run is _train and not options.dry_run
        hint = "; go on from the newest checkpoint: the same command with --resume" if is_training else ""
        print(f"rekatrain: interrupted{hint}", file=sys.stderr)
        sys.exit(130)


def _train(options: argparse.Namespace) -> None:
    api.train(
        options.recipe,
        *options.overrides,
        resume=options.resume,
        dry_run=options.dry_run,
        skip_memory_check=options.skip_memory_check,
    )


def _plan(options: argparse.Namespace) -> None:
    recipe = api.check_recipe(options.recipe, *options.overrides)
    from rekatrain.trainer.plan.plan import plan

    is_fitting = plan(
        recipe,
        launch_file=options.launch,
        num_gpus=options.gpus,
        num_nodes=options.nodes,
        gpu_memory=options.gpu_memory,
        host_memory=options.host_memory,
        prompt_tokens=options.prompt_tokens,
        table=options.table,
    )
    sys.exit(0 if is_fitting else 1)


def _sample(options: argparse.Namespace) -> None:
    api.sample(
        options.recipe,
        *options.overrides,
        num_prompts=options.num_prompts,
        by_disagreement=options.by_disagreement,
    )


def _serve_rollouts(options: argparse.Namespace) -> None:
    recipe = api.check_recipe(options.recipe, *options.overrides)
    if recipe.stage != "rloo":
        raise InputError(f"stage {recipe.stage} has no rollouts: give serve-rollouts an rloo recipe")
    from rekatrain.trainer.rloo.sampler.vllm.serve import serve_rollouts

    serve_rollouts(
        recipe,
        host=options.host,
        port=options.port,
        tensor_parallel_size=options.tensor_parallel_size,
        print_only=options.print,
    )


def _evaluate(options: argparse.Namespace) -> None:
    api.evaluate(options.recipe, *options.overrides, out=options.out)


def _export(options: argparse.Namespace) -> None:
    api.export(
        options.run_folder,
        options.out,
        form=options.form,
        dtype=options.dtype,
        quantize=options.quantize,
        max_shard_size=options.max_shard_size,
    )


def _recipes(options: argparse.Namespace) -> None:
    from rekatrain.trainer.recipe.shipped import write_recipes

    write_recipes(options.out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rekatrain",
        description="Train Reka Flash 3 and other Llama-compatible chat models: SFT, reward models and RLOO.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"rekatrain {rekatrain.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    _add_train(commands.add_parser("train", help="train a model: run the recipe's stage (sft, reward or rloo)"))
    _add_plan(commands.add_parser("plan", help="print the memory and the time that a run needs; load no weights"))
    _add_sample(commands.add_parser("sample", help="roll out a few prompts and print their rewards; train nothing"))
    _add_serve(commands.add_parser("serve-rollouts", help="start a vLLM server that samples for an rloo run"))
    _add_evaluate(commands.add_parser("evaluate", help="measure accuracy on eval_dataset, with a 95 %% interval"))
    _add_export(commands.add_parser("export", help="write a run's weights for transformers, vLLM or llama.cpp"))
    recipes = commands.add_parser("recipes", help="write the shipped recipes and launch files into a new folder")
    recipes.add_argument("out", type=Path, metavar="OUT", help="the folder to write; it must not exist yet")
    recipes.set_defaults(run=_recipes)
    return parser


def _add_train(command: argparse.ArgumentParser) -> None:
    _add_recipe(command)
    command.add_argument(
        "--dry-run", action="store_true", help="check everything, print the resolved recipe and one row, and stop"
    )
    command.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint in output_dir; start from the beginning if there is none",
    )
    command.add_argument(
        "--skip-memory-check", action="store_true", help="start even if the plan says that the run cannot fit"
    )
    command.set_defaults(run=_train)


def _add_plan(command: argparse.ArgumentParser) -> None:
    _add_recipe(command)
    command.add_argument(
        "--launch", type=Path, metavar="FILE", help="plan for this Accelerate launch file (default: for this machine)"
    )
    command.add_argument(
        "--gpus", type=_positive, metavar="N", help="plan for N GPUs with a whole model on each, without a launch file"
    )
    command.add_argument(
        "--nodes", type=_positive, default=1, metavar="N", help="number of nodes that hold the GPUs (default 1)"
    )
    command.add_argument(
        "--gpu-memory", type=_positive, default=80, metavar="GB", help="memory of one GPU (default 80)"
    )
    command.add_argument(
        "--host-memory", type=_positive, metavar="GB", help="memory of one node; not checked without this option"
    )
    command.add_argument(
        "--prompt-tokens", type=_positive, metavar="N", help="number of tokens of a prompt (default 256)"
    )
    tables = command.add_mutually_exclusive_group()
    for name, help in (
        ("compare", "print a table: SFT and RLOO x full, LoRA, QLoRA x ZeRO stages x 1 to 64 GPUs"),
        ("scale-out", "print a table: estimated throughput of RLOO on 8 to 1,024 GPUs"),
    ):
        tables.add_argument(f"--{name}", dest="table", action="store_const", const=name, help=help)
    command.set_defaults(run=_plan)


def _add_sample(command: argparse.ArgumentParser) -> None:
    _add_recipe(command)
    command.add_argument(
        "--num-prompts", type=_positive, default=2, metavar="N", help="number of prompts to roll out (default 2)"
    )
    command.add_argument(
        "--by-disagreement",
        action="store_true",
        help="print first the completions on which the rewards disagree most",
    )
    command.set_defaults(run=_sample)


def _add_serve(command: argparse.ArgumentParser) -> None:
    _add_recipe(command)
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    command.add_argument(
        "--port", type=_positive, help="port to listen on (default: that of vllm_server_base_url, or 8000)"
    )
    command.add_argument(
        "--tensor-parallel-size", type=_positive, default=1, metavar="N", help="GPUs of this server (default 1)"
    )
    command.add_argument("--print", action="store_true", help="print the command that starts the server, and stop")
    command.set_defaults(run=_serve_rollouts)


def _add_evaluate(command: argparse.ArgumentParser) -> None:
    _add_recipe(command)
    command.add_argument("--out", type=Path, metavar="FILE", help="write the result and every answer to a JSON file")
    command.set_defaults(run=_evaluate)


def _add_export(command: argparse.ArgumentParser) -> None:
    command.add_argument("run_folder", type=Path, metavar="RUN", help="a run folder, or one checkpoint of it")
    command.add_argument("out", type=Path, metavar="OUT", help="the folder to write; it must not exist yet")
    command.add_argument(
        "--as",
        dest="form",
        choices=["merged", "adapter", "gguf"],
        default="merged",
        help="merged (default): for transformers and vLLM; adapter: the LoRA adapter alone; gguf: for llama.cpp",
    )
    command.add_argument(
        "--quantize",
        nargs="+",
        metavar="TYPE",
        choices=GGUF_TYPES,
        help=f"types of the GGUF files: {', '.join(GGUF_TYPES)} (default: the dtype of the weights)",
    )
    command.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="dtype of the stored weights (default: the recipe's)"
    )
    command.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="largest size of one weights file (default 5GB)"
    )
    command.set_defaults(run=_export)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def _add_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", type=Path, metavar="RECIPE", help="the recipe, a YAML file")
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="a value in place of the recipe's, such as rloo.beta=0.1; null removes a section",
    )
