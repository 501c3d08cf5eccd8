"""`--as merged --quantize fp8|gptq|awq`: a merged export that llmcompressor quantizes, for vLLM.

llmcompressor asks for an older transformers than this program, so it runs in a separate environment, whose Python
LLMCOMPRESSOR_PYTHON names. It loads the whole model. The result is loaded by a fresh process of that environment, and
held against the merged weights on all tokens of the texts whose log-probabilities the training process saved; the
merged weights are held against these first. (The few whole distributions that it saved, too, are not enough: the KL
varies by its own size from token to token.)
"""

import json
import logging
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rekatrain.data.chat import encode_prompt
from rekatrain.data.errors import InputError
from rekatrain.trainer.export.probe import ExportRejected
from rekatrain.trainer.export.serving import TEMPLATES
from rekatrain.trainer.recipe.load import Recipe
from rekatrain.trainer.run.folder import RECIPE_FILE, ROLLOUTS_FILE
from rekatrain.trainer.run.records import read_records

logger = logging.getLogger(__name__)

PYTHON = "LLMCOMPRESSOR_PYTHON"
SCRIPT = TEMPLATES / "compress.py"
# Largest mean KL from the training process, in nats per token, unless --max-kl names another. Eight bits move a
# distribution little; the bound for four bits is that of q4_k_m in GGUF.
LIMITS = {"fp8": 0.05, "gptq": 0.5, "awq": 0.5}
# llmcompressor's examples calibrate with 256 to 512 sequences of 2,048 tokens.
NUM_ROWS, MAX_TOKENS = 256, 2048
# For which vLLM has kernels. 128 is usual; Reka Flash 3's intermediate size, 19,648, is a multiple of 64.
GROUP_SIZES = (128, 64, 32)


def check_compressible(quantize: list[str]) -> None:
    """Raise InputError unless `--quantize` names one method, and the Python of llmcompressor can run it."""
    if len(quantize) != 1 or quantize[0] not in LIMITS:
        raise InputError(
            f"--quantize {' '.join(quantize)}: --as merged writes one of {', '.join(LIMITS)}; the types of GGUF files "
            "need --as gguf"
        )
    python = os.environ.get(PYTHON, sys.executable)
    if not _has_package(python):
        raise InputError(
            f"--quantize {quantize[0]} needs the package llmcompressor, which {python!r} does not have: install it in "
            f"a separate environment (python -m venv lc && lc/bin/pip install llmcompressor) and set {PYTHON} to "
            "lc/bin/python"
        )


def _has_package(python: str) -> bool:
    if python == sys.executable:
        return find_spec("llmcompressor") is not None
    find = "import importlib.util, sys; sys.exit(importlib.util.find_spec('llmcompressor') is None)"
    return shutil.which(python) is not None and subprocess.run([python, "-c", find]).returncode == 0


def group_size(model: nn.Module) -> int:
    """Return the number of weights with one scale in four bits: 128, or what divides the inputs of all layers.

    Raises InputError if 32 does not.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    layers = {
        name: module.in_features
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    for size in GROUP_SIZES:
        if all(width % size == 0 for width in layers.values()):
            return size
    name, width = next((name, width) for name, width in layers.items() if width % GROUP_SIZES[-1])
    raise InputError(
        f"--quantize gptq and awq share a scale between {GROUP_SIZES[-1]} or more inputs of a layer, and {name} has "
        f"{width}: use fp8"
    )


def calibration_rows(recipe: Recipe, run: Path, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return token ids of the run's own texts: its last rollouts, or rows of its data set; at most 256."""
    if (run / ROLLOUTS_FILE).exists():
        records = list(read_records(run / ROLLOUTS_FILE))[-NUM_ROWS:]
        rows = [encode_prompt(record["prompt"], tokenizer) + record["completion_ids"] for record in records]
    else:
        from rekatrain.trainer.sft import prepare

        encoded = prepare(recipe).rows
        chosen = random.Random(0).sample(range(len(encoded)), min(NUM_ROWS, len(encoded)))
        rows = [list(encoded[index].input_ids) for index in chosen]
    return [row[:MAX_TOKENS] for row in rows]


def compress(whole: Path, folder: Path, kind: str, rows: Sequence[Sequence[int]], group: int) -> None:
    """Quantize the merged export in `whole` into `folder`, with its tokenizer and generation config.

    rows, group: of `calibration_rows` and `group_size`, for four bits
    """
    with TemporaryDirectory() as work:
        calibration = Path(work, "rows.json")
        calibration.write_text(json.dumps(rows))
        _run("quantize", kind, str(whole), str(folder), str(calibration), str(group))
    # In a folder of this program, a recipe.yaml is that of a run.
    (folder / RECIPE_FILE).rename(folder / "quantization.yaml")
    for path in whole.iterdir():
        if path.suffix != ".safetensors" and not path.name.endswith(".index.json") and path.name != "config.json":
            shutil.copyfile(path, folder / path.name)


def verify_compressed(
    folder: Path, kind: str, texts: Sequence[Tensor], logprobs: Sequence[Tensor], max_kl: float | None = None
) -> float:
    """Return the mean KL of the quantized model from the merged one, in nats per token.

    Raises ExportRejected if it is beyond the limit.

    texts, logprobs: token ids [L] of each text, and the merged model's log-probabilities [L, V] of every next token
    max_kl:          the limit, in place of that of `LIMITS`
    """
    with TemporaryDirectory() as work:
        save_file({str(index): ids.contiguous() for index, ids in enumerate(texts)}, Path(work, "ids.safetensors"))
        _run("logprobs", str(folder), f"{work}/ids.safetensors", f"{work}/logprobs.safetensors")
        quantized = load_file(Path(work, "logprobs.safetensors"))
    kls = torch.cat([(ours.exp() * (ours - quantized[str(index)])).sum(dim=1) for index, ours in enumerate(logprobs)])
    kl, error = kls.mean().item(), kls.std().item() / len(kls) ** 0.5
    limit = LIMITS[kind] if max_kl is None else max_kl
    if not kl <= limit:
        raise ExportRejected(
            f"the export failed its verification and is not kept: {kind} moves the distributions of training by a mean "
            f"KL of {kl:.3g} nats per token (standard error {error:.2g}), and {limit:g} is allowed: export another "
            "form, or allow more by --max-kl"
        )
    logger.info(
        "verified in a fresh process: %s, KL from training %.2g nats per token (standard error %.1g over %d tokens, at "
        "most %g)",
        *(kind, kl, error, len(kls), limit),
    )
    return kl


def _run(*arguments: str) -> None:
    # Its environment is its own: not the folders from which this process imports.
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    command = [os.environ.get(PYTHON, sys.executable), str(SCRIPT), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"llmcompressor failed ({arguments[0]}):\n{done.stderr.strip()[-2000:]}")
