"""The work of each arm in a comparison of RLOO engines, its measurement, and its start in a separate process."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import TUNED_MALLOC, wait_for
from transformers import PreTrainedModel

from rekatrain.trainer.rloo.config import RLOOConfig

Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Work:
    """The work that all arms do.

    recipe:        source of prompts, rewards and k; None: `prompts`, and a reward that varies in every group
    equal_lengths: every completion has the length of the cap
    """

    model: str
    recipe: str | None = None
    prompts: str | None = None
    steps: int = 3
    prompts_per_step: int = 4
    num_generations: int = 8
    max_completion_length: int = 64
    beta: float = 0.0
    equal_lengths: bool = False
    learning_rate: float = 1e-6
    seed: int = 0
    micro_batch_tokens: int = RLOOConfig.micro_batch_tokens
    dtype: str = "float32"


@dataclass(kw_only=True)
class Meter:
    """Seconds and token slots by phase, and the sampled lengths, for each step."""

    seconds: Counter[str] = field(default_factory=Counter)
    slots: Counter[str] = field(default_factory=Counter)
    steps: list[dict[str, Any]] = field(default_factory=list)
    sampled: list[tuple[int, int]] = field(default_factory=list)  # prompt and completion length
    rewards: list[float] = field(default_factory=list)
    _phase: str = "train"
    _started: float = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time and slots inside this context for `name`; outside of all contexts they count for `train`."""
        outer, self._phase, began = self._phase, name, now()
        yield
        self.seconds[name] += now() - began
        self._phase = outer

    def watch(self, model: PreTrainedModel) -> None:
        """Count the slots of every call of the model, recomputation by checkpointing included.

        The hook is inside the first layer, because recomputation does not call the hooks of the layer. On a GPU nothing
        is counted: the replay of a CUDA graph calls no hook.
        """
        if torch.cuda.is_available():
            return
        norm = model.get_decoder().layers[0].input_layernorm
        norm.register_forward_pre_hook(lambda _, args: self._count(args[0]))

    def _count(self, hidden_BTD: torch.Tensor) -> None:
        self.slots[self._phase] += hidden_BTD.shape[0] * hidden_BTD.shape[1]

    def begin(self) -> None:
        self._started = now()

    def end_step(self, num_generations: int, num_passes: int) -> None:
        """Close a step; `num_passes` is the number of passes that every token needs besides sampling."""
        total = now() - self._started
        prompts = sum(prompt for prompt, _ in self.sampled[::num_generations])
        lengths = [length for _, length in self.sampled]
        needed = prompts + sum(lengths) - len(lengths)
        # The training pass is not checked: groups with equal rewards are left out of it.
        if not torch.cuda.is_available() and self.slots["sample"] < needed:
            raise RuntimeError(f"{self.slots['sample']} token slots were counted in sampling, {needed} are needed")
        seconds = {**self.seconds, "train": total - sum(self.seconds.values())}
        self.steps.append(
            {
                "seconds": total,
                **{f"seconds_{name}": seconds.get(name, 0.0) for name in ("sample", "score", "reward", "train")},
                "completions": len(lengths),
                "slots": dict(self.slots),
                "slots_needed": needed * (1 + num_passes),
                "prompt_tokens": [prompt for prompt, _ in self.sampled[::num_generations]],
                "lengths": lengths,
                "reward": sum(self.rewards) / len(self.rewards),
            }
        )
        for kept in (self.seconds, self.slots, self.sampled, self.rewards):
            kept.clear()
        self._started = now()


def now() -> float:
    """Return the time in seconds, after a GPU has run all that was launched."""
    wait_for("cuda" if torch.cuda.is_available() else "cpu")
    return time.perf_counter()


def by_ids(completion_ids: Sequence[list[int]], **_: object) -> list[float | None]:
    """Return rewards that vary within every group, so that no arm can skip a group."""
    return [sum(ids) % 7 / 7 + number / 1000 for number, ids in enumerate(completion_ids)]


def run_arm(arm: str, work: Work, *, is_tuned: bool = True) -> Result:
    """Run one arm in a separate process."""
    inherited = {name: value for name, value in os.environ.items() if name not in TUNED_MALLOC}
    environment = {**inherited, **(TUNED_MALLOC if is_tuned else {}), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    with TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        command = [sys.executable, str(Path(__file__).with_name("arms.py")), arm, json.dumps(vars(work)), str(out)]
        finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if finished.returncode:
            raise RuntimeError(f"{arm} failed:\n{finished.stderr[-3000:]}")
        return json.loads(out.read_text())
