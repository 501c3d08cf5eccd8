"""The arguments of the command line: commands, options and their help."""

import argparse
import re
from pathlib import Path

import rekatrain
from rekatrain.trainer.export.gguf_type_names import COMPRESSED_TYPES, GGUF_TYPES

EXAMPLES = """\
examples:
  rekatrain recipes my-recipes                               write the shipped recipes into a folder of yours
  rekatrain train my-recipes/smollm2/rloo.yaml --dry-run     check everything, load no weights
  rekatrain train my-recipes/smollm2/rloo.yaml rloo.max_steps=100
  rekatrain launch my-recipes/reka-flash-3/sft-lora.yaml     train on all GPUs of this machine
  accelerate launch --config_file my-recipes/accelerate/zero3.yaml -m rekatrain train RECIPE
  rekatrain COMMAND --help                                   show a command's options
"""


def make_parser() -> argparse.ArgumentParser:
    """Make the parser; `command` is the name of the command, or None."""
    parser = argparse.ArgumentParser(
        prog="rekatrain",
        description="Train Reka Flash 3 and other Llama-compatible chat models: SFT, reward models and RLOO.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"rekatrain {rekatrain.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    _add_train(commands.add_parser("train", help="train a model: run the recipe's stage (sft, reward or rloo)"))
    _add_launch(
        commands.add_parser("launch", help="train on all GPUs: start the vLLM servers and the training processes")
    )
    _add_plan(commands.add_parser("plan", help="print the memory and the time that a run needs; load no weights"))
    _add_sample(commands.add_parser("sample", help="roll out a few prompts and print their rewards; train nothing"))
    for name, help, description in (
        (
            "generate",
            "write SFT rows: sample, score by the rewards, keep",
            "Sample completions of the recipe's prompts from its model or a server, score them by its rewards, and "
            "write those that the section generate: keeps as SFT rows. A second start goes on and asks nothing twice.",
        ),
        (
            "filter",
            "keep the prompts whose pass rate lies in a range",
            "Sample completions of the recipe's prompts from its model or a server, and write the prompts whose pass "
            "rate lies in the range of the section filter:. A second start goes on and asks nothing twice.",
        ),
    ):
        _add_recipe(commands.add_parser(name, help=help, description=description))
    _add_serve(commands.add_parser("serve-rollouts", help="start a vLLM server that samples for an rloo run"))
    _add_check_rewards(
        commands.add_parser(
            "check-rewards", help="score the right answer of every row by its own rewards, and wrong ones"
        )
    )
    _add_evaluate(commands.add_parser("evaluate", help="measure accuracy on eval_dataset, with a 95 %% interval"))
    _add_compare(commands.add_parser("compare", help="paired difference of two evaluations, and the rows that changed"))
    _add_report(commands.add_parser("report", help="write one HTML file: curves, recipe and completions of runs"))
    _add_export(commands.add_parser("export", help="write a run's weights for transformers, vLLM or llama.cpp"))
    _add_chat(commands.add_parser("chat", help="talk to an export, or to its server, in the terminal"))
    recipes = commands.add_parser("recipes", help="write the shipped recipes and launch files into a new folder")
    recipes.add_argument("out", type=Path, metavar="OUT", help="the folder to write; it must not exist yet")
    return parser


def _add_train(command: argparse.ArgumentParser) -> None:
    _add_recipe(command)
    command.add_argument(
        "--dry-run", action="store_true", help="check everything, print the resolved recipe and one row, and stop"
    )
    _add_start(command)


def _add_launch(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Start the vLLM servers and the training processes of a recipe, watch them, and end all of them with the run. "
        "The recipe's section launch: decides, or else the plan. Exit status: that of rekatrain train."
    )
    _add_recipe(command)
    command.add_argument("--dry-run", action="store_true", help="print the commands that would be started, and stop")
    _add_start(command)


def _add_start(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint in output_dir; start from the beginning if there is none",
    )
    command.add_argument(
        "--skip-memory-check", action="store_true", help="start even if the plan says that the run cannot fit"
    )


def _add_plan(command: argparse.ArgumentParser) -> None:
    _add_recipe(command)
    command.add_argument(
        "--launch", type=Path, metavar="FILE", help="plan for this Accelerate launch file (default: for this machine)"
    )
    command.add_argument(
        "--gpus",
        type=_positive,
        metavar="N",
        help="plan for N GPUs that train: as the launch file says, or with a whole model on each",
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
    rates = command.add_mutually_exclusive_group()
    rates.add_argument(
        "--calibrate", type=Path, metavar="FILE", help="measure this machine's speed, write it to FILE and plan with it"
    )
    rates.add_argument("--rates", type=Path, metavar="FILE", help="plan with the speeds that --calibrate wrote")
    tables = command.add_mutually_exclusive_group()
    for name, help in (
        ("compare", "print a table: SFT and RLOO x full, LoRA, QLoRA x ZeRO stages x 1 to 64 GPUs"),
        ("scale-out", "print a table: estimated throughput of RLOO on 8 to 1,024 GPUs"),
    ):
        tables.add_argument(f"--{name}", dest="table", action="store_const", const=name, help=help)


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


def _add_serve(command: argparse.ArgumentParser) -> None:
    _add_recipe(command)
    command.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    command.add_argument(
        "--port", type=_port, help="port to listen on (default: that of vllm_server_base_url, or 8000)"
    )
    command.add_argument(
        "--tensor-parallel-size", type=_positive, default=1, metavar="N", help="GPUs of this server (default 1)"
    )
    command.add_argument("--print", action="store_true", help="print the command that starts the server, and stop")


def _add_check_rewards(command: argparse.ArgumentParser) -> None:
    command.description = (
        "Score the gold of every row of dataset by the recipe's own rewards, and wrong answers made from golds. Exit "
        "status 1 if a reward gives no gold of a source more than 0. Loads no model."
    )
    _add_recipe(command)
    command.add_argument(
        "--num-rows", type=_positive, metavar="N", help="rows to check, evenly spread (default: the whole data set)"
    )
    command.add_argument(
        "--num-wrong",
        type=_positive,
        default=200,
        metavar="N",
        help="rows of each source and reward to which wrong answers are made (default 200)",
    )


def _add_evaluate(command: argparse.ArgumentParser) -> None:
    _add_recipe(command)
    command.add_argument("--out", type=Path, metavar="FILE", help="write the result and every answer to a JSON file")


def _add_compare(command: argparse.ArgumentParser) -> None:
    command.add_argument("a", type=Path, metavar="A", help="a file of rekatrain evaluate --out")
    command.add_argument("b", type=Path, metavar="B", help="another one, of the same eval_dataset")
    command.add_argument("--reward", metavar="NAME", help="the deciding reward (default: that of A)")
    command.add_argument(
        "--out", type=Path, metavar="FILE", help="write the result and all rows that changed to a JSON file"
    )


def _add_report(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="run folders, running ones too, and files of rekatrain evaluate --out",
    )
    command.add_argument(
        "--out", type=Path, default=Path("report.html"), metavar="FILE", help="the file to write (default report.html)"
    )
    command.add_argument(
        "--max-completions",
        type=_positive,
        default=100_000,
        metavar="N",
        help="take an even sample of more completions (default 100000); all stay in rollouts.jsonl",
    )


def _add_export(command: argparse.ArgumentParser) -> None:
    command.add_argument("run_folder", type=Path, metavar="RUN", help="a run folder, or one checkpoint of it")
    command.add_argument("out", type=Path, metavar="OUT", help="the folder to write; it must not exist yet")
    command.add_argument(
        "--checkpoint",
        metavar="NAME",
        help="which checkpoint of RUN: best (by metric_for_best_model), or a step (default: the newest)",
    )
    command.add_argument(
        "--average",
        type=_positive,
        default=1,
        metavar="N",
        help="export the mean of the last N checkpoints, up to --checkpoint (default 1)",
    )
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
        choices=[*GGUF_TYPES, *COMPRESSED_TYPES],
        help=f"types of the GGUF files: {', '.join(GGUF_TYPES)} (default: the dtype of the weights); or one of "
        f"{', '.join(COMPRESSED_TYPES)} of a merged model, by llmcompressor",
    )
    command.add_argument(
        "--max-kl",
        type=_kl,
        metavar="NATS",
        help="largest mean KL from training that a quantized export may have, in nats per token (default: by its type)",
    )
    command.add_argument("--dtype", choices=["float32", "bfloat16"], help="of stored weights (default: the recipe's)")
    command.add_argument(
        "--push-to-hub",
        metavar="OWNER/NAME",
        help="also upload the export into this repository of the hub; a new one is private (token: HF_TOKEN)",
    )
    command.add_argument(
        "--max-shard-size",
        type=_size,
        default="5GB",
        metavar="SIZE",
        help="largest size of one weights file (default 5GB)",
    )


def _add_chat(command: argparse.ArgumentParser) -> None:
    command.description = "Ctrl-C ends the answer, Ctrl-D the conversation."
    command.add_argument("export", type=Path, nargs="?", metavar="EXPORT", help="a folder of rekatrain export")
    command.add_argument("--url", help="of a server with OpenAI's protocol, such as http://127.0.0.1:8000/v1")
    command.add_argument("--model", metavar="NAME", help="model of a server that has several (default: its adapter)")


def _positive(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and below a billion")
    return int(text)


def _port(text: str) -> int:
    if _positive(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is no port: write a number from 1 to 65535")
    return int(text)


def _kl(text: str) -> float:
    if not re.fullmatch(r"[0-9]{0,3}(\.[0-9]{1,9})?(e-?[0-9]{1,2})?", text, re.IGNORECASE) or not 0 < float(text) < 100:
        raise argparse.ArgumentTypeError(f"{text!r} is no KL: write nats per token above 0 and below 100, such as 0.1")
    return float(text)


def _size(text: str) -> str:
    if not re.fullmatch("[1-9][0-9]{0,5}[KMGT]B", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write a whole number and KB, MB, GB or TB, such as 5GB")
    return text


def _add_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", type=Path, metavar="RECIPE", help="the recipe, a YAML file")
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="a value in place of the recipe's, such as rloo.beta=0.1; null removes a section",
    )
