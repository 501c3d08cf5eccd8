"""Compare predicted with measured peak memory, for every combination of stage and options that runs on a CPU.

    python tests/benchmarks/plan.py --tokenizer runs/smollm2-135m
    python tests/benchmarks/plan.py --tokenizer runs/smollm2-135m --device cuda --engines single --tokens 8192

Random Llamas of Reka Flash 3's proportions (8 query heads to a key-value head, an MLP 3.2 times as wide, untied
embeddings) are trained for two steps by the real command, each run in a separate process, or in two that share the
steps (`--engines`: data parallelism, ZeRO 1 to 3).
Sequences and completions have the length that the plan assumes. The measurement is VmHWM, the peak resident memory of
the process, without the mapped pages of its libraries, whose number depends on the file cache. The allocator returns
freed blocks at once (see MALLOC_SETTINGS), so that VmHWM is the peak of live memory. Both numbers include the
interpreter. On a GPU it is the peak that PyTorch allocated; the prediction leaves out the context and fragmentation.
There adapters lie on a bfloat16 model, and all weights are trained with bfloat16 arithmetic.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import add_device_argument, load_folder_tokenizer, make_parser, print_table, write_report
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from rekatrain.data.chat import encode_text, render_prompt
from rekatrain.trainer.plan.machine import GB, PlannedLaunch
from rekatrain.trainer.plan.memory import make_plan
from rekatrain.trainer.recipe.load import Recipe

PROJECT = Path(__file__).parents[2]
MALLOC_SETTINGS = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
SIZES = {"30M": (256, 8), "60M": (384, 16), "135M": (576, 30)}  # hidden size and layers, with SmolLM2's vocabulary
ENGINES = ("single", "ddp", "zero1", "zero2", "zero3")  # of one process, and of two
FORMATS = {"sft": "messages", "reward": "preference", "rloo": "prompt_answer"}  # of the rows of each stage
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
# The rewards of a group must differ: a group with equal rewards is not trained on.
REWARD = """
def by_letters(completions, **kwargs):
    return [sum(map(ord, text)) % 97 / 97 for text in completions]
"""
RUN = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[3:]
import os
if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    import deepspeed
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # takes minutes to compile and uses no memory
if __name__ == "__main__":  # the reward workers import this file, too
    from rekatrain.trainer.cli import main
    from common import mapped_weights_mb, memory_mb
    main(["train", sys.argv[1]])
    import torch
    on_gpu = torch.cuda.is_available()
    libraries = memory_mb("RssFile") - mapped_weights_mb()
    peak = torch.cuda.max_memory_allocated() / 2**20 if on_gpu else memory_mb("VmHWM") - libraries
    Path(sys.argv[2] + os.environ.get("RANK", "0")).write_text(str(peak))
"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A recipe, and its launch.

    engine: "single" (one process), or two processes: "ddp", or "zero1" to "zero3" (DeepSpeed)
    device: "cpu", where no process sees a GPU, or "cuda"
    """

    size: str
    stage: str
    section: dict[str, Any] = field(default_factory=dict)
    has_adapter: bool = False
    engine: str = "single"
    device: str = "cpu"

    @property
    def name(self) -> dict[str, object]:
        return {
            "model": self.size,
            "stage": self.stage,
            "weights": "lora" if self.has_adapter else "full",
            "checkpointing": self.section["gradient_checkpointing"],
            "beta": self.section.get("beta", "-"),
            "engine": "one process" if self.engine == "single" else f"{self.engine} x 2",
        }

    @property
    def launch(self) -> PlannedLaunch:
        """The launch that is planned."""
        is_cpu = self.device == "cpu"
        if self.engine == "single":
            return PlannedLaunch(is_cpu=is_cpu)
        if self.engine == "ddp":
            return PlannedLaunch(engine="ddp", num_gpus=2, is_cpu=is_cpu)
        return PlannedLaunch(engine="deepspeed", zero_stage=int(self.engine[-1]), num_gpus=2, is_cpu=is_cpu)


def all_cases(sizes: Sequence[str], tokens: int, engines: Sequence[str], device: str = "cpu") -> Iterator[Case]:
    """Yield SFT, reward model and RLOO; full and LoRA; with and without checkpointing; without and with a reference.

    engines: launches of two processes; under each, a stage runs with checkpointing and a reference only
    """
    for size in sizes:
        for has_adapter in (False, True):
            for checkpointing in (False, True):
                common: dict[str, Any] = {"gradient_checkpointing": checkpointing}
                common["bf16"] = device == "cuda" and not has_adapter
                rows = {"max_steps": 2, "per_device_train_batch_size": 2, "max_length": tokens // 4}
                where: dict[str, Any] = {"has_adapter": has_adapter, "device": device}
                for stage in ("sft", "reward"):
                    yield Case(size=size, stage=stage, section=common | rows, **where)
                for beta in (0.0, 0.05):
                    rloo = {"max_steps": 2, "prompts_per_step": 2, "num_generations": 4, "beta": beta}
                    lengths = {"max_completion_length": tokens // 8, "micro_batch_tokens": tokens}
                    yield Case(size=size, stage="rloo", section=common | rloo | lengths, **where)
            for engine in engines:
                shared: dict[str, Any] = {"size": size, "has_adapter": has_adapter, "engine": engine, "device": device}
                for stage in ("sft", "reward"):
                    yield Case(stage=stage, section=common | rows, **shared)
                yield Case(stage="rloo", section=common | rloo | lengths, **shared)


def make_model(folder: Path, tokenizer: PreTrainedTokenizerBase, hidden: int, layers: int) -> None:
    """Save a random Llama that never samples its EOS token."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 16 // 5,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=1,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # a direction that all embeddings have and that lowers the logit of EOS
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[tokenizer.eos_token_id, 0] = -10.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_rows(folder: Path, tokenizer: PreTrainedTokenizerBase, tokens: int) -> None:
    """Write a data set for each stage; the sequences of sft and reward have about `tokens` tokens."""
    word = next(text for text in (" a", "a") if len(tokenizer(text, add_special_tokens=False)["input_ids"]) == 1)
    answers = [word * (tokens - 40 - number) for number in range(8)]  # every batch is padded
    rows = {
        "sft": [
            {"messages": [{"role": "user", "content": "Go on."}, {"role": "assistant", "content": a}]} for a in answers
        ],
        "reward": [{"prompt": "Go on.", "chosen": a + " b", "rejected": a} for a in answers],
        "rloo": [{"prompt": "Go on.", "answer": str(number)} for number in range(8)],
    }
    for stage, of_stage in rows.items():
        (folder / f"{stage}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_stage))


def count_prompt_tokens(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of tokens of the prompt, which is the same in all rows."""
    return len(encode_text(render_prompt([{"role": "user", "content": "Go on."}]), tokenizer))


def run_case(case: Case, folder: Path, models: dict[str, Path], prompt_tokens: int) -> dict[str, Any]:
    """Predict and measure the peak memory of one case; return both in GB, and their ratio."""
    is_cpu = case.device == "cpu"
    dtype = "bfloat16" if case.has_adapter and not is_cpu else "float32"
    sections: dict[str, Any] = {
        "model": {"pretrained_model_name_or_path": str(models[case.size]), "dtype": dtype},
        "dataset": {"path": str(folder / f"{case.stage}.jsonl"), "format": FORMATS[case.stage]},
        case.stage: case.section,
        **({"lora": LORA} if case.has_adapter else {}),
        **({"rewards": {"varying_reward:by_letters": {"weight": 1.0}}} if case.stage == "rloo" else {}),
    }
    recipe = Recipe(stage=case.stage, output_dir=str(folder / "run"), **sections)  # type: ignore[arg-type]
    launch, command = case.launch, [sys.executable]
    if launch.num_gpus > 1:
        file = PROJECT / "recipes" / "accelerate" / f"{case.engine}.yaml"
        command += ["-m", "accelerate.commands.launch", "--config_file", str(file), "--num_processes", "2"]
    plan = make_plan(recipe, launch, prompt_tokens=prompt_tokens)
    (folder / "recipe.yaml").write_text(json.dumps({k: v for k, v in vars(recipe).items() if v is not None}))
    (folder / "run.py").write_text(RUN)
    (folder / "varying_reward.py").write_text(REWARD)
    paths = [str(PROJECT), str(Path(__file__).parent)]
    out = folder / "peak"
    settings = {**MALLOC_SETTINGS, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    settings |= {"CUDA_VISIBLE_DEVICES": ""} if is_cpu else {}
    finished = subprocess.run(
        [*command, str(folder / "run.py"), str(folder / "recipe.yaml"), str(out), *paths],
        env={**os.environ, **settings},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    shutil.rmtree(folder / "run", ignore_errors=True)
    if finished.returncode:
        raise RuntimeError(f"{case} failed:\n{finished.stderr[-3000:]}")
    measured = max(float(Path(f"{out}{rank}").read_text()) for rank in range(launch.num_gpus)) * 2**20 / GB
    margin = 0 if is_cpu else plan.worst.gpu["context, fragmentation"]
    predicted = (plan.worst.gpu_bytes - margin) / GB
    return {
        **case.name,
        "phase": plan.worst.name,
        "predicted GB": predicted,
        "measured GB": measured,
        "ratio": predicted / measured,
    }


def main() -> None:
    """Run all cases, print a table and write the report."""
    parser = make_parser(__doc__, "plan.json")
    add_device_argument(parser)
    parser.add_argument("--tokenizer", required=True, help="model folder whose tokenizer is used")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["30M", "135M"])
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per micro-batch")
    parser.add_argument("--engines", nargs="*", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--stages", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    arguments = parser.parse_args()
    tokenizer = load_folder_tokenizer(arguments.tokenizer)
    with TemporaryDirectory() as name:
        folder = Path(name)
        models = {size: folder / size for size in arguments.sizes}
        for size, path in models.items():
            make_model(path, tokenizer, *SIZES[size])
        prompt_tokens = count_prompt_tokens(tokenizer)
        write_rows(folder, tokenizer, arguments.tokens // 4)
        results = []
        for case in all_cases(arguments.sizes, arguments.tokens, ENGINES[1:], arguments.device):
            if case.stage in arguments.stages and case.engine in arguments.engines:
                results.append(run_case(case, folder, models, prompt_tokens))
                print(json.dumps(results[-1]), flush=True)
    print_table(results)
    largest_error = max(abs(result["ratio"] - 1) for result in results)
    print(f"\n{len(results)} combinations, largest error {largest_error:.1%}")
    write_report(arguments.out, arguments, results)


if __name__ == "__main__":
    main()
