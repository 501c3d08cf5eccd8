"""Verification of an export in a fresh process, against log-probabilities that the exporting process computed."""

import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rekatrain.data.chat import Message
from rekatrain.data.errors import TrainingStopped

logger = logging.getLogger(__name__)


class ExportRejected(TrainingStopped):
    """An export differs from the trained model by more than its form allows; nothing is left of it."""


# Each conversation uses one rule of the format: system folding, reasoning of earlier turns, an open last turn, a role
# that is rendered as it is.
CONVERSATIONS: list[list[Message]] = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "human", "content": "def f(x):\n    return x\n"}],
    [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": " <reasoning>\nA greeting.\n</reasoning>\n\nHello!"},
        {"role": "user", "content": "Bye"},
    ],
    [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "<reasoning>\nThe user"}],
    [{"role": "user", "content": "Hi"}, {"role": "tool", "content": "{}"}],
]


def probe_logprobs(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the log-probabilities of every next token after each of `ids`: [1, L] -> [L, V] float32."""
    with torch.no_grad():
        return model(input_ids=ids).logits[0].float().log_softmax(dim=-1)


def verify_logprobs(
    target: Path,
    probe: Tensor,
    logprobs: Tensor,
    *,
    module: str = "rekatrain.trainer.export.verify",
    checkpoint: Path | None = None,
    max_kl: float | None = None,
) -> None:
    """Verify `target` by `module`, whose REFERENCE is a safetensors file of `ids` [1, L] and `logprobs` [L, V].

    checkpoint: the module also gets this folder, with the log-probabilities of the training process
    max_kl:     the module also gets this limit, in nats per token
    """
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as reference:
        save_file({"ids": probe, "logprobs": logprobs.contiguous()}, reference.name)
        others = [str(value) for value in (checkpoint, max_kl) if value is not None]
        verify_in_fresh_process(module, target, reference.name, *others)


def verify_in_fresh_process(module: str, target: Path, *references: str) -> None:
    """Run `python -m MODULE TARGET REFERENCE...`.

    A fresh process, because weights in memory prove nothing about the files. Raises ExportRejected for a property that
    does not hold, and RuntimeError with the process's output for other errors.
    """
    # The child imports from exactly where this process does. Without -P it would search the working folder first, and a
    # user's `random.py` there would replace the standard library's, which the `rekatrain` script never does.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    command = [sys.executable, "-P", "-m", module, str(target), *references]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode != 0:
        *_, last = result.stderr.strip().splitlines() or [""]
        if last.startswith("AssertionError: "):
            raise ExportRejected(
                f"the export failed its verification and is not kept: {last.removeprefix('AssertionError: ')}"
            )
        raise RuntimeError(f"the export in {target} failed its verification:\n{result.stderr.strip()}")
    logger.info(result.stdout.strip())
