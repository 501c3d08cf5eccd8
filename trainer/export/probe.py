"""What an export is held against: conversations, and log-probabilities of the exporting process."""

import logging
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rekatrain.data.chat import Message
from safetensors.torch import save_file
from torch import Tensor, nn

logger = logging.getLogger(__name__)


# Each renders a rule of the format: system folding, reasoning of earlier turns, an open last turn, a literal role.
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
    """Log-probabilities of every next token after each of `ids` [1, L] -> [L, V] float32."""
    with torch.no_grad():
        return model(input_ids=ids).logits[0].float().log_softmax(dim=-1)


def prove(target: Path, probe: Tensor, logprobs: Tensor, *, module: str = "rekatrain.trainer.export.verify") -> None:
    """Have another process load `target` and compare; what is in memory here proves nothing about the files.

    module: called with the target and a safetensors file of `ids` [1, L] and `logprobs` [L, V]
    """
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as reference:
        save_file({"ids": probe, "logprobs": logprobs.contiguous()}, reference.name)
        command = [sys.executable, "-m", module, str(target), reference.name]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the export in {target} failed its verification:\n{done.stderr.strip()}")
    logger.info(done.stdout.strip())
