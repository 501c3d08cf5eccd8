"""The test for a launch of several processes; it imports no torch."""

import os


def is_launched() -> bool:
    """Return True in a process of a launch of several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1
