"""Peak memory of this process on its host. Imports no torch."""

import resource
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def peak_host_bytes() -> int:
    """Return the most resident memory that this process has had, in bytes.

    Linux keeps the peak of its program as VmHWM. `ru_maxrss` begins with the peak of the process that started this one,
    which may be a launcher that has loaded a model.
    """
    if STATUS.exists():
        line = next((line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:")), None)
        if line is not None:
            return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
