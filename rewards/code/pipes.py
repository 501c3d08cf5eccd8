"""Read what a sandbox writes, within limits of time and size."""

import os
import select
import time
from typing import Literal


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
    descriptor = os.memfd_create(name)
    with os.fdopen(os.dup(descriptor), "wb") as file:
        file.write(content)
    os.lseek(descriptor, 0, os.SEEK_SET)
    return descriptor


def read_verdicts(descriptor: int, num_tests: int, *, seconds: float, total: float) -> bytes:
    """Read a verdict per test, each within its time limit; or fewer and `!` with the reason why there are no more."""
    deadline = time.monotonic() + total
    data = b""
    while len(data) < num_tests or b"!" in data:
        part, ending = read(descriptor, 1_000, min(seconds, deadline - time.monotonic()), at_once=True)
        data += part
        if ending != "more":
            break
    return data
