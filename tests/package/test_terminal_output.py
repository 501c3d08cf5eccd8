"""A run on a terminal of 100 columns: no noise of the libraries, a step line that fits, and a last line that helps."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from pathlib import Path

import pytest

from tests.package.processes import BIN, environment, write_recipes

COLUMNS = 100
# The lines of a run, in any order; a bar is drawn several times.
EXPECTED = (
    r"plan: .*",
    r"model: .*",
    r"Loading weights: .*",
    r"rows.jsonl: \d+ rows, encoded .*",
    r"engine: .*",
    r"step 0/1 \|          \| *",
    r"step 1/1 \|█{10}\| loss [\d.]+  accuracy [\d.]+%  [\d,]+ tok/s  epoch [\d.]+  grad [\d.]+  eta \dm\d\ds *",
    r"run folder: sft; next: rekatrain export sft OUT",
)


def run_on_a_terminal(folder: Path, *command: str | Path) -> list[str]:
    """Run a command with a pseudo-terminal for its output; return the lines, each state of a bar as one."""
    reader, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, COLUMNS, 0, 0))
    process = subprocess.Popen(
        list(map(str, command)), cwd=folder, env=environment(), stdin=terminal, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    output = b""
    try:
        while block := os.read(reader, 4096):
            output += block
    except OSError:  # Linux reports the end of the other side so
        pass
    os.close(reader)
    assert process.wait() == 0, output.decode()
    return [line for line in re.split(r"[\r\n]+", output.decode()) if line.strip()]


@pytest.mark.slow
@pytest.mark.launched
def test_sft_run_shows_its_own_lines_alone(tmp_path: Path, model_folder: Path) -> None:
    write_recipes(tmp_path, model_folder)
    lines = run_on_a_terminal(tmp_path, BIN / "rekatrain", "train", "sft.yaml")
    assert [line for line in lines if not any(re.fullmatch(pattern, line) for pattern in EXPECTED)] == []
    assert all(any(re.fullmatch(pattern, line) for line in lines) for pattern in EXPECTED)
    assert all(len(line) <= COLUMNS for line in lines if line.startswith("step"))
    assert not (tmp_path / "sft" / "checkpoints" / "README.md").exists()
