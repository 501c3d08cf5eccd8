"""Log-probabilities of a few texts by the model in training, saved with each checkpoint.

An export that is compared with a second load of the same files can be wrong in the same way. These numbers come from
the training process itself: its base, its adapter, its scales.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from rekatrain.data.chat import Message, encode_prompt, render_completion, render_prompt
from rekatrain.trainer.run.folder import RunFolder

PROBE_FILE = "probe.safetensors"
# Tokens of each text: enough for thousands of tokens of context to matter little to the cost of a save.
MAX_TOKENS = 512
# Prefixes after which whole distributions are kept: 0.4 MB each for a vocabulary of 100,000.
NUM_PREFIXES = 8
QUESTION: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2+2? Explain in one sentence why 1,234 is even."},
]
ANSWER = render_completion("Its last digit is 4.", "4; 1,234 ends in an even digit: def f(x):\n    return x % 2")
# Largest difference of a log-probability, largest mean difference over a text, and largest mean KL after the prefixes,
# in nats, by the weights' dtype. bfloat16 has 8 bits: in SmolLM2-135M, trained by recipes/smollm2, rounding of weights
# and arithmetic moves a token of probability e^-25 by 1.9, all tokens by 0.13 on average, and the distributions by a
# KL of 4e-3. In float32 the log-probabilities say enough. QLoRA trains on a quantized base; its export is not.
TOLERANCES = {"float32": (1e-3, 1e-4, math.inf), "bfloat16": (4.0, 0.25, 2e-2), "quantized": (math.inf, 1.0, math.inf)}


@dataclass(frozen=True, kw_only=True)
class TrainingProbe:
    """Texts, and the model's log-probability of each of their tokens after the first.

    ids:      token ids, [L] for each text
    logprobs: nats, [L - 1] for each text, float32
    dtype:    of the weights that computed them: float32, bfloat16 or quantized
    nexts:    log-probabilities of every next token after a few prefixes of the first text, [N, V] float32, with the
              lengths of the prefixes, [N]; for engines that are compared by a KL
    """

    ids: list[Tensor]
    logprobs: list[Tensor]
    dtype: str
    nexts: tuple[Tensor, Tensor] | None = None

    def save(self, checkpoint: Path) -> None:
        """Write the probe into a checkpoint's folder."""
        tensors = {f"ids.{index}": ids for index, ids in enumerate(self.ids)}
        tensors |= {f"logprobs.{index}": logprobs for index, logprobs in enumerate(self.logprobs)}
        if self.nexts is not None:
            tensors |= {"next_logprobs": self.nexts[0], "prefix_lengths": self.nexts[1]}
        save_file(tensors, checkpoint / PROBE_FILE, metadata={"dtype": self.dtype})


def choose_texts(tokenizer: PreTrainedTokenizerBase, own: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the ids of a fixed turn with a reasoning, and of the shortest and the longest of the run's own texts."""
    fixed = encode_prompt(render_prompt(QUESTION) + ANSWER, tokenizer)
    texts = [fixed, min(own, key=len), max(own, key=len)] if own else [fixed]
    return [list(ids[:MAX_TOKENS]) for ids in texts if len(ids) > 1]


def run_probe(model: PreTrainedModel | PeftModel, texts: Sequence[Sequence[int]]) -> TrainingProbe:
    """Compute the log-probabilities of texts; under ZeRO-3 every process must call this.

    The distribution is over all of the model's embeddings, at temperature 1 and without dropout.
    """
    was_training = model.training
    model.eval()
    parameter = next(model.parameters())
    device = torch.device("cpu") if parameter.is_meta else parameter.device  # an export runs without weights in memory
    ids = [torch.tensor(text) for text in texts]
    logprobs: list[Tensor] = []
    with torch.no_grad():
        for text in ids:
            logits = model(input_ids=text[None].to(device)).logits[0, :-1].float()
            if not logprobs:
                lengths = torch.linspace(1, len(logits), min(NUM_PREFIXES, len(logits))).long()
                nexts = logits[(lengths - 1).to(logits.device)].log_softmax(1).cpu(), lengths
            chosen = logits.gather(1, text[1:, None].to(logits.device))[:, 0]
            logprobs.append((chosen - logits.logsumexp(1)).cpu())
    model.train(was_training)
    is_quantized = getattr(model.config, "quantization_config", None) is not None
    dtype = "quantized" if is_quantized else str(parameter.dtype).removeprefix("torch.")
    return TrainingProbe(ids=ids, logprobs=logprobs, dtype=dtype, nexts=nexts if ids else None)


@contextmanager
def own_arithmetic(model: nn.Module) -> Iterator[None]:
    """Context in which a model computes in the dtype of its weights: Accelerate's `forward` autocasts to bfloat16."""
    if "_original_forward" not in model.__dict__:
        yield
        return
    patched, original = model.__dict__["forward"], model.__dict__["_original_forward"]
    model.forward = original
    try:
        yield
    finally:
        model.forward = patched


class SaveProbe(TrainerCallback):
    """Adds the probe to the checkpoints of transformers' Trainer."""

    def __init__(self, run: RunFolder, texts: Sequence[Sequence[int]]) -> None:
        self._run, self._texts = run, texts

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **event: Any) -> None:
        """Write the file into the checkpoint that is being written."""
        model = extract_model_from_parallel(event["model"])
        with own_arithmetic(model):
            probe = run_probe(model, self._texts)
        if state.is_world_process_zero:
            probe.save(self._run.partial_checkpoint(state.global_step))


def read_probe(checkpoint: Path) -> TrainingProbe | None:
    """Return the probe of a checkpoint; None if it has none, as those of versions before 0.2.0."""
    if not (checkpoint / PROBE_FILE).exists():
        return None
    tensors = load_file(checkpoint / PROBE_FILE)
    with safe_open(checkpoint / PROBE_FILE, framework="pt") as file:
        dtype = file.metadata()["dtype"]
    indices = range(sum(name.startswith("ids.") for name in tensors))
    return TrainingProbe(
        ids=[tensors[f"ids.{index}"] for index in indices],
        logprobs=[tensors[f"logprobs.{index}"] for index in indices],
        dtype=dtype,
        nexts=(tensors["next_logprobs"], tensors["prefix_lengths"]) if "next_logprobs" in tensors else None,
    )


def compare(probe: TrainingProbe, logprobs: Sequence[Tensor]) -> tuple[float, float]:
    """Return the largest difference of a log-probability, and the largest mean difference over a text, in nats."""
    differences = [(ours - theirs).abs() for ours, theirs in zip(probe.logprobs, logprobs, strict=True)]
    return (
        max(float(difference.max()) for difference in differences),
        max(float(difference.mean()) for difference in differences),
    )


def find_difference(training: TrainingProbe, other: TrainingProbe) -> str | None:
    """Return the difference between two probes of the same texts as text, or None if it is within the tolerance.

    The coarser of the two dtypes sets the tolerance. A server returns no whole distributions, and so no KL.
    """
    largest, mean = compare(training, other.logprobs)
    limits = max(TOLERANCES[training.dtype], TOLERANCES[other.dtype])
    if not (largest <= limits[0] and mean <= limits[1]):
        return (
            f"log-probabilities differ from those of the training process by up to {largest:.3g} and by {mean:.3g} on "
            f"average over a text; {limits[0]:g} and {limits[1]:g} are allowed"
        )
    kl = mean_kl(training, other)
    if kl is not None and not kl <= limits[2]:
        return (
            f"distributions differ from those of the training process by a mean KL of {kl:.3g} nats per token; "
            f"{limits[2]:g} is allowed"
        )
    return None


def mean_kl(training: TrainingProbe, other: TrainingProbe) -> float | None:
    """Return KL(training || other) in nats per token, the mean after the prefixes; None if one has no distributions."""
    if training.nexts is None or other.nexts is None:
        return None
    expected, actual = (nexts[0].double().log_softmax(1) for nexts in (training.nexts, other.nexts))
    return float((expected.exp() * (expected - actual)).sum(1).mean())
