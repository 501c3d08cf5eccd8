"""Run folders for reports, and their pages in a real Chromium without a window."""

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")
RECIPE = {"stage": "rloo", "output_dir": "run", "seed": 0, "rloo": {"max_steps": 4, "beta": 0.0}}


def completion(step: int, number: int, text: str, **others: Any) -> dict[str, Any]:
    """Return a record of rollouts.jsonl."""
    record: dict[str, Any] = {"step": step, "prompt_index": number, "row": f"sums.jsonl:{number}", "source": "sums"}
    record |= {"prompt": f"human: {number} + {number} <sep> assistant:", "gold": str(2 * number), "completion": text}
    record |= {"completion_ids": [1] * len(text), "finish_reason": "stop", "reward_errors": {}, "kl": None}
    return record | {"rewards": {"math": 1.0}, "reward": 1.0, "advantage": 0.5} | others


def write_run(
    folder: Path,
    *,
    metrics: Sequence[dict[str, Any]] = (),
    rollouts: Sequence[dict[str, Any]] | None = None,
    recipe: dict[str, Any] | None = None,
) -> Path:
    """Write the files of a run folder that a report reads."""
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(json.dumps(RECIPE | (recipe or {})))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in metrics))
    if rollouts is not None:
        (folder / "rollouts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in rollouts))
    return folder


def browse(page: Path, address: str, scratch: Path, *, width: int = 1280, height: int = 900) -> str:
    """Return the document that Chromium has made of the page at an address of it, once its script has run."""
    assert CHROMIUM is not None
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={scratch}",
        f"--window-size={width},{height}",
    ]
    command = [CHROMIUM, *options, "--virtual-time-budget=6000", "--dump-dom", f"file://{page}#{address}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def text_of(document: str) -> str:
    """Return the visible part of a document, without the blocks of data."""
    return re.sub(r"<script.*?</script>", "", document, flags=re.DOTALL)
