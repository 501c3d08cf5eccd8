"""Places that a command will write to, checked before it works for them."""

import errno
import os
from pathlib import Path

from rekatrain.data.errors import InputError


def check_parent(path: Path, name: str) -> None:
    """Raise InputError unless a new file or folder can be made at `path`, with the folders above it.

    name: the option or key that names the path, for the message
    """
    existing = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        reason = os.strerror(errno.EACCES if existing.is_dir() else errno.ENOTDIR)
        raise InputError(f"{name} {str(path)!r} cannot be written: {reason} ({existing}); choose another place")


def check_new_file(path: Path, name: str) -> None:
    """Raise InputError unless a file can be written at `path`; one that is there is replaced."""
    if path.is_dir():
        raise InputError(f"{name} {str(path)!r} is a folder: name the file to write in it")
    check_parent(path, name)
