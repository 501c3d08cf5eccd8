"""Count the files and functions of ours that one RLOO step calls, and list them in the order of first call.

    python tests/benchmarks/trace.py

The step: 1 prompt x 2 completions on a tiny Llama made on the spot, beta 0.1, a plain batch reward, no workers, no
servers, through `rekatrain train`. Functions count from the call of `take_step` to its return. Comprehensions and
lambdas do not count, nor do the files of GUARDS, which save and restore the process around a reward and never see a
completion. A change of file: the next function of the list is in another file than the one before it.
"""

import importlib.util
import json
import os
import sys
import tempfile
from itertools import groupby
from pathlib import Path
from types import CodeType, FrameType

os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
# Modules beside this file have the names of packages (`rewards.py`): only what is installed should be found.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]

from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed  # noqa: E402

STEP = "take_step"
PACKAGES = ("data", "rewards", "trainer")
GUARDS = ("rewards/process_state.py", "rewards/shield.py")
REWARD = "def count_a(completions, **kwargs):\n    return [float(text.count('a')) for text in completions]\n"


def write_run(folder: Path) -> Path:
    """Write a model, a prompt, a reward and a recipe of one step into `folder`; return the path of the recipe."""
    eos = "<|endoftext|>"
    vocabulary = {token: index for index, token in enumerate([eos, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=eos, eos_token=eos).save_pretrained(folder / "model")
    sizes = {"vocab_size": len(vocabulary), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 0}
    set_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.2)).save_pretrained(folder / "model")
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "What is 2+2?", "answer": 4}))
    (folder / "my_reward.py").write_text(REWARD)
    step = {"max_steps": 1, "prompts_per_step": 1, "num_generations": 2, "max_completion_length": 16, "beta": 0.1}
    recipe = {
        "stage": "rloo",
        "output_dir": str(folder / "run"),
        "model": {"pretrained_model_name_or_path": str(folder / "model"), "dtype": "float32"},
        "dataset": {"path": str(folder / "prompts.jsonl"), "format": "prompt_answer"},
        "rewards": {"my_reward:count_a": {"weight": 1.0}},
        "rloo": {**step, "learning_rate": 1e-3},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    return folder / "recipe.yaml"


def trace_step(recipe: Path, package: str) -> list[CodeType]:
    """Run `train` on the recipe; return the functions called within its first step, in the order of first call."""
    command = importlib.import_module(f"{package}trainer.cli").main
    called: dict[CodeType, None] = {}
    steps: list[FrameType] = []

    def profile(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and not steps and frame.f_code.co_name == STEP:
            steps.append(frame)
        if event == "call" and steps:
            called.setdefault(frame.f_code)
        if event == "return" and steps and frame is steps[0]:
            sys.setprofile(None)

    sys.setprofile(profile)
    command(["train", str(recipe)])
    sys.setprofile(None)
    if not called:
        raise RuntimeError(f"no function named {STEP} was called")
    return list(called)


def main() -> None:
    package = "rekatrain." if importlib.util.find_spec("rekatrain") else ""
    root = Path(str(importlib.import_module(f"{package}trainer").__file__)).resolve().parents[1]
    with tempfile.TemporaryDirectory() as folder:
        sys.path.append(folder)  # the reward
        codes = trace_step(write_run(Path(folder)), package)
    paths = [(Path(code.co_filename).resolve(), code) for code in codes if not code.co_name.startswith("<")]
    ours = [(path.relative_to(root), code) for path, code in paths if path.is_relative_to(root)]
    ours = [(path, code) for path, code in ours if path.parts[0] in PACKAGES and str(path) not in GUARDS]
    visits = [(path, list(group)) for path, group in groupby(ours, key=lambda pair: pair[0])]
    for number, (path, group) in enumerate(visits):
        print(f"{number:3} {path!s:45} {', '.join(code.co_qualname for _, code in group)}")
    print(f"files {len({path for path, _ in ours})}, functions {len(ours)}, changes of file {len(visits) - 1}")


if __name__ == "__main__":
    main()
