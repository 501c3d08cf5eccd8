"""The command line: `rekatrain COMMAND ...`, the same as `python -m rekatrain COMMAND ...`.

Errors of the user's are one line and exit status 2; anything else is a bug of ours and shows its traceback.
"""

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rekatrain.data.errors import InputError
from rekatrain.rewards.errors import RewardError
from rekatrain.trainer.recipe.load import Recipe, load_recipe

RECIPE_HELP = "the recipe, a YAML file"
GGUF_TYPES = ["f32", "bf16", "f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m"]
OVERRIDES_HELP = "values set over the recipe's, as in rloo.beta=0.1; null takes a section out"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; exit with 2 and one line where its input is wrong."""
    parser = _parser()
    options, others = parser.parse_known_args(arguments)
    # argparse takes no `key=value` after an option that follows the recipe.
    if any(text.startswith("-") or "=" not in text for text in others) or (others and "overrides" not in options):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    if others:
        options.overrides += others
    is_main_process = os.environ.get("RANK", "0") == "0"
    logging.basicConfig(level=logging.INFO if is_main_process else logging.ERROR, format="%(message)s")
    for chatty in ("accelerate", "httpx", "httpx2", "datasets", "transformers", "DeepSpeed", "filelock", "gguf"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # in a log, the libraries' bars are thousand-character lines
    try:
        options.run(options)
    except InputError as error:
        if is_main_process:
            print(f"rekatrain: error: {error}", file=sys.stderr)
        sys.exit(2)
    except RewardError as error:  # with the traceback of the grader, which is the one that matters
        print(f"rekatrain: error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("rekatrain: interrupted; --resume goes on from the newest checkpoint", file=sys.stderr)
        sys.exit(130)


# Each command imports what it needs when it runs: torch takes seconds, and a wrong recipe should be told at once.


def _train(options: argparse.Namespace) -> None:
    recipe = _recipe(options)
    if options.dry_run:
        from rekatrain.trainer.dry_run import dry_run

        dry_run(recipe, resume=options.resume)
        return
    from rekatrain.trainer.plan.plan import check_fits
    from rekatrain.trainer.process_failure import end_with_the_others

    check_fits(recipe, is_overridden=options.skip_memory_check)

    if recipe.stage == "sft":
        from rekatrain.trainer.sft import train
    elif recipe.stage == "reward":
        from rekatrain.trainer.reward_model.train import train
    else:
        from rekatrain.trainer.rloo.train import train
    with end_with_the_others():
        train(recipe, resume=options.resume)


def _plan(options: argparse.Namespace) -> None:
    from rekatrain.trainer.plan.plan import plan

    is_fitting = plan(
        _recipe(options),
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
    from rekatrain.trainer.rloo.sample_command import sample

    recipe = _recipe(options)
    if recipe.stage == "reward":
        raise InputError("stage reward samples nothing; give sample an rloo recipe")
    sample(recipe, num_prompts=options.num_prompts, by_disagreement=options.by_disagreement)


def _serve_rollouts(options: argparse.Namespace) -> None:
    recipe = _recipe(options)
    if recipe.stage != "rloo":
        raise InputError(f"stage {recipe.stage} has no rollouts; give serve-rollouts an rloo recipe")
    from rekatrain.trainer.rloo.sampler.vllm.serve import serve_rollouts

    serve_rollouts(
        recipe,
        host=options.host,
        port=options.port,
        tensor_parallel_size=options.tensor_parallel_size,
        print_only=options.print,
    )


def _evaluate(options: argparse.Namespace) -> None:
    recipe = _recipe(options)
    if recipe.stage == "reward":
        from rekatrain.trainer.reward_model.evaluate_pairs import evaluate as evaluate_reward_model

        evaluate_reward_model(recipe, out=options.out)
    else:
        from rekatrain.trainer.evaluate import evaluate

        evaluate(recipe, out=options.out)


def _export(options: argparse.Namespace) -> None:
    from rekatrain.trainer.export.export import export

    export(
        options.run_folder,
        options.out,
        form=options.form,
        dtype=options.dtype,
        quantize=options.quantize,
        max_shard_size=options.max_shard_size,
    )


def _recipe(options: argparse.Namespace) -> Recipe:
    recipe = load_recipe(options.recipe, options.overrides)
    from rekatrain.trainer.recipe.sections import check_sections

    check_sections(recipe)
    return recipe


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rekatrain", description="SFT, reward models and RLOO for Reka Flash 3 and its like."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="run the recipe's stage")
    _add_recipe(train)
    train.add_argument("--dry-run", action="store_true", help="check all, print the resolved recipe and one row, stop")
    train.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint in output_dir; start where there is none",
    )
    train.add_argument(
        "--skip-memory-check", action="store_true", help="start even where the plan says that it cannot fit"
    )
    train.set_defaults(run=_train)

    plan = commands.add_parser("plan", help="memory by part and phase, and time, before a weight is loaded")
    _add_recipe(plan)
    plan.add_argument("--launch", type=Path, metavar="FILE", help="an Accelerate launch file (default: this machine)")
    plan.add_argument("--gpus", type=_positive, help="in place of a launch file: so many, a whole model on each")
    plan.add_argument("--nodes", type=_positive, default=1, help="that the GPUs are in (default 1)")
    plan.add_argument("--gpu-memory", type=_positive, default=80, metavar="GB", help="of one GPU (default 80)")
    plan.add_argument("--host-memory", type=_positive, metavar="GB", help="of one host; not compared without it")
    plan.add_argument("--prompt-tokens", type=_positive, metavar="N", help="length of a prompt (default 256)")
    tables = plan.add_mutually_exclusive_group()
    for name, help in (
        ("compare", "SFT and RLOO x full, LoRA, QLoRA x ZeRO stages x 1 to 64 GPUs"),
        ("scale-out", "throughput of RLOO on 8 to 1,024 GPUs"),
    ):
        tables.add_argument(f"--{name}", dest="table", action="store_const", const=name, help=help)
    plan.set_defaults(run=_plan)

    sample = commands.add_parser("sample", help="roll out groups for a few rows and show their rewards; trains nothing")
    _add_recipe(sample)
    sample.add_argument("--num-prompts", type=_positive, default=2, help="rows to roll out (default 2)")
    sample.add_argument(
        "--by-disagreement", action="store_true", help="the completions on which the rewards disagree most first"
    )
    sample.set_defaults(run=_sample)

    serve = commands.add_parser("serve-rollouts", help="start a vLLM server that samples for an rloo run")
    _add_recipe(serve)
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    serve.add_argument("--port", type=_positive, help="port (default: of the recipe's vllm_server_base_url, or 8000)")
    serve.add_argument("--tensor-parallel-size", type=_positive, default=1, help="GPUs of this server (default 1)")
    serve.add_argument("--print", action="store_true", help="print the line that starts it, and stop")
    serve.set_defaults(run=_serve_rollouts)

    evaluate = commands.add_parser("evaluate", help="accuracy on eval_dataset with a 95 %% interval")
    _add_recipe(evaluate)
    evaluate.add_argument("--out", type=Path, help="a JSON file for the result and every answer")
    evaluate.set_defaults(run=_evaluate)

    export = commands.add_parser(
        "export", help="write a run's weights as a folder that transformers, vLLM or llama.cpp serves"
    )
    export.add_argument("run_folder", type=Path, metavar="RUN", help="a run folder, or one checkpoint's folder in it")
    export.add_argument("out", type=Path, metavar="OUT", help="the new folder")
    export.add_argument(
        "--as",
        dest="form",
        choices=["merged", "adapter", "gguf"],
        default="merged",
        help="merged (default): for transformers and vLLM; adapter: the LoRA adapter alone; gguf: for llama.cpp",
    )
    export.add_argument(
        "--quantize",
        nargs="+",
        metavar="TYPE",
        choices=GGUF_TYPES,
        help=f"GGUF files to write: {', '.join(GGUF_TYPES)} (default: the weights' own dtype)",
    )
    export.add_argument(
        "--dtype", choices=["float32", "bfloat16"], help="of the stored weights (default: the recipe's)"
    )
    export.add_argument("--max-shard-size", default="5GB", help="of one weights file (default 5GB)")
    export.set_defaults(run=_export)
    return parser


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return int(text)


def _add_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", type=Path, metavar="RECIPE", help=RECIPE_HELP)
    command.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES_HELP)
