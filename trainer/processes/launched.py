"""The test for a launch of several processes; it imports no torch."""

import os

# Variables that hold the rank of a process and the place of its launch; some job files export a few of them, too.
LAUNCHER_VARIABLES = (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("GROUP_RANK", "ROLE_RANK", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE"),
)


def is_launched() -> bool:
    """Return True in a process of a launch of several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def leave_launch() -> None:
    """Remove the variables of a launcher from the environment: this process starts a launch, and is not part of one."""
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
