"""Tell names of local files and folders from ids of the Hugging Face hub."""

from pathlib import Path

# Starts of a path that is no id: a user who names `runs/sft` means a folder, though there may be none yet.
PATH_STARTS = (".", "/", "~", "runs/", "exports/")


def names_path(text: str) -> bool:
    """Return True if the text names a local file or folder: it exists, or begins as a path does; else it is a hub id.

    >>> names_path("./model"), names_path("RekaAI/reka-flash-3")
    (True, False)
    """
    return text.startswith(PATH_STARTS) or Path(text).exists()
