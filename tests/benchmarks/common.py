"""Code that all benchmarks use: prompts, models, the description of the machine, memory, tables and reports."""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, is_dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

sys.path.insert(0, str(Path(__file__).parents[2]))

from rekatrain.data.chat import render_prompt  # noqa: E402  # the package is in the folder just added
from rekatrain.data.rows import Row  # noqa: E402
from rekatrain.data.sources import load_rows  # noqa: E402
from rekatrain.data.tokenizer import load_tokenizer  # noqa: E402
from rekatrain.trainer.plan.calibrate import copy_rate, product_rate  # noqa: E402
from rekatrain.trainer.prompts import Prompt  # noqa: E402

# glibc returns large blocks to the kernel, which clears them page by page at the next allocation.
TUNED_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "2000000000",
    "MALLOC_TRIM_THRESHOLD_": "8000000000",
    "MALLOC_TOP_PAD_": "500000000",
}
NEVER = "<|never|>"


def make_parser(description: str | None, default_out: str) -> argparse.ArgumentParser:
    """Make a parser with the options of every benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/benchmarks") / default_out, help="file of the JSON report"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for a model folder and for its prompts."""
    parser.add_argument("--model", required=True, help="model folder, such as recipes/smollm2/fetch_model.py writes")
    parser.add_argument(
        "--prompts", help="a .jsonl with `question` or `prompt`; default: reasoning_gym's gsm_symbolic word problems"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the weights")


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Add the option for the device of the model."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where the model runs (default cpu)")


def load_model(folder: str, device: str = "cpu", dtype: str = "float32") -> PreTrainedModel:
    """Load a model in eval mode."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device)


def wait_for(device: torch.device | str) -> None:
    """Wait until a GPU has run all that was launched; a CPU has."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def load_folder_tokenizer(folder: str, *, never_ends: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder; `never_ends` gives it an eos token that no model has a logit for."""
    tokenizer = load_tokenizer(folder)
    if never_ends:
        tokenizer.add_special_tokens({"eos_token": NEVER})
    return tokenizer


def load_prompts(tokenizer: PreTrainedTokenizerBase, path: str | None, count: int) -> list[Prompt]:
    """Load prompts in the chat format of the model if its tokenizer has one, else in Reka's."""
    if path is None:
        questions: Iterable[str] = (
            row.messages[0]["content"] for row in load_rows("reasoning_gym:gsm_symbolic", size=count, seed=0).rows
        )
    else:
        with Path(path).open(encoding="utf-8") as lines:
            records = [json.loads(line) for line in islice(lines, count)]
        questions = [record.get("question") or record["prompt"] for record in records]
    prompts = []
    for number, question in enumerate(questions):
        messages = [{"role": "user", "content": question}]
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        else:
            text = render_prompt(messages)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        prompts.append(Prompt(text=text, ids=ids, row=Row(messages=messages, columns={}, where=str(number))))
    return prompts


def self_times(action: Callable[[], Any]) -> list[tuple[str, int, float]]:
    """Profile an action -> (name, calls, self time) of each operator, the longest first: a GPU's time where one ran."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with profile(activities=activities) as profiler:
        action()
    # A kernel is listed by itself and in the operator that launched it; in a CUDA graph only by itself.
    events = profiler.key_averages()
    on_gpu = [event for event in events if event.device_type == DeviceType.CUDA]
    times = (
        [(event.key, event.count, event.self_device_time_total) for event in on_gpu]
        if on_gpu
        else [(event.key, event.count, event.self_cpu_time_total) for event in events]
    )
    return sorted(times, key=lambda time: -time[2])


def memory_mb(field: str) -> float:
    """Return the resident memory of this process in MB: `VmRSS` now, or `VmHWM` at its peak.

    ru_maxrss of getrusage would start from the value of the parent process.
    """
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field + ":"))
    return int(line.split()[1]) / 1024


def mapped_weights_mb() -> float:
    """Return the resident memory of mapped weight files in MB: frozen weights of the stored dtype are read in place."""
    total, is_weights = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, second, *_ = line.split()
        if "-" in first:  # the addresses of a mapping, and its file
            is_weights = line.endswith(".safetensors")
        elif is_weights and first in ("Rss:", "Anonymous:"):  # a page that training writes becomes anonymous
            total += int(second) if first == "Rss:" else -int(second)
    return total / 1024


def machine() -> dict[str, Any]:
    """Return the processor, its threads and rates, and the versions of the packages."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    packages = ("torch", "transformers", "trl", "accelerate", "numpy")
    return {
        "processor": next((line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")), ""),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "malloc": {name: os.environ.get(name) for name in TUNED_MALLOC},
        "python": platform.python_version(),
        **machine_rates(),
        **{name: importlib.metadata.version(name) for name in packages},
    }


@cache
def machine_rates() -> dict[str, float]:
    """Return the rate of a large matrix product in float32 and that of a copy: on the GPU, or in torch's threads."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return {
        "GFLOP/s in products": product_rate(device, torch.float32) / 1e9,
        "GB/s in copies": copy_rate(device, device) / 1e9,
    }


def write_report(path: Path, settings: argparse.Namespace, results: Any) -> None:
    """Write the machine, the settings and the results as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {"machine": machine(), "settings": vars(settings), "results": results}
    path.write_text(json.dumps(report, indent=1, default=_plain) + "\n", encoding="utf-8")
    print(f"\nwritten: {path}")


def print_table(lines: Sequence[dict[str, Any]], title: str = "") -> None:
    """Print dictionaries with the same keys as the lines of a table."""
    print(f"\n{title}" if title else "")
    print(tabulate(lines, headers="keys", floatfmt=".3g", missingval="-"), flush=True)


def _plain(value: object) -> object:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)
