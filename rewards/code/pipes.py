"""Read what a sandbox writes, within limits of time and size."""

import fcntl
import os
import select
import time
from dataclasses import dataclass
from typing import Literal

CALLED, FAULT = b"c", b"!"  # beside 0 and 1, the verdicts


@dataclass(frozen=True, kw_only=True)
class Verdicts:
    """The verdicts up to the first test that has none; `fault`: why the tests, not the solution, are to blame."""

    passed: list[bool]
    fault: str = ""


def read(
    descriptor: int, size: int, seconds: float, *, at_once: bool = False
) -> tuple[bytes, Literal["closed", "time", "output", "more"]]:
    """Read until the other end is closed, the time is over, or more than `size` bytes have arrived.

    at_once: return what arrives first, with "more"
    """
    deadline = time.monotonic() + seconds
    data = bytearray()
    while True:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([descriptor], [], [], left)[0]:
            return bytes(data), "time"
        part = os.read(descriptor, 1 << 16)
        if not part:
            return bytes(data), "closed"
        data += part
        if at_once:
            return bytes(data), "more"
        if len(data) > size:
            return bytes(data[:size]), "output"


def memory_file(name: str, content: bytes) -> int:
    """Return a file in memory, at its start, that nobody can change."""
    descriptor = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    seals = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def read_verdicts(descriptor: int, num_tests: int, *, seconds: float, total: float) -> Verdicts:
    """Read a verdict per test, each within its time limit.

    Tests that need longer before they have used the solution are at fault. So is the total limit if no test was late.
    """
    deadline = time.monotonic() + total
    data = b""
    while True:
        left = deadline - time.monotonic()
        part, ending = read(descriptor, 1_000, min(seconds, left), at_once=True)
        data += part
        verdicts, is_fault, reason = data.partition(FAULT)
        passed = [verdict == ord("1") for verdict in verdicts.replace(CALLED, b"")]
        if is_fault and ending == "more":
            continue  # until the reason is complete
        if is_fault:
            return Verdicts(passed=passed, fault=reason.decode(errors="replace"))
        if ending != "more" or len(passed) >= num_tests:
            break
    if ending == "time" and not verdicts:
        return Verdicts(passed=[], fault=f"they have not used the code within {min(seconds, total):g} s")
    if ending == "time" and left < seconds and total > seconds:
        fault = f"{num_tests} need more than total_time_limit ({total:g} s) together: raise total_time_limit"
        return Verdicts(passed=passed, fault=fault)
    return Verdicts(passed=passed)
