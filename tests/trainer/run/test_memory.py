"""Peak memory of a process."""

import subprocess
import sys

MEGABYTE = 1_000_000
CODE = """
import sys
from rekatrain.trainer.run.memory import peak_host_bytes
before = peak_host_bytes()
block = bytearray(int(sys.argv[1]))
block[::4096] = b"x" * len(block[::4096])
del block
print(before, peak_host_bytes())
"""


def test_peak_host_bytes_is_that_of_the_own_process() -> None:
    """A process that a large one started begins at its own size, and keeps its peak after the memory is free again."""
    large = bytearray(600 * MEGABYTE)
    large[::4096] = b"x" * len(large[::4096])
    command = [sys.executable, "-c", CODE, str(200 * MEGABYTE)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    before, after = map(int, output.split())
    assert before < 300 * MEGABYTE
    assert before + 190 * MEGABYTE < after < 600 * MEGABYTE
    assert len(large) == 600 * MEGABYTE
