"""The files that a process may open, by Landlock (Linux 5.13): a few folders to read, and nothing to write.

It needs no right, and holds for all that the process becomes. Packages that wrap it are not part of a Python
installation; it is three system calls.
"""

import ctypes
import os
import stat

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same numbers on all architectures
VERSION = 1  # flag of CREATE_RULESET
PATH_BENEATH = 1
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1, 2, 4, 8
# The file accesses, network accesses and scopes that each version of Landlock can deny.
FILE_ACCESSES = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 5: 0xFFFF}
NETWORK, SCOPES = (4, 0x3), (6, 0x3)  # since the version
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/urandom", "/dev/random")


class Ruleset(ctypes.Structure):
    """struct landlock_ruleset_attr"""

    _fields_ = [("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scopes", ctypes.c_uint64)]


class PathRule(ctypes.Structure):
    """struct landlock_path_beneath_attr"""

    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32)]


def version() -> int:
    """Return the version of Landlock of this kernel; raise OSError if it has none."""
    return _call(CREATE_RULESET, None, ctypes.c_size_t(0), VERSION)


def make_rules(visible: list[str], version: int) -> int:
    """Return the descriptor of rules that allow to read `visible`, and the devices, and nothing else."""
    files = max(access for since, access in FILE_ACCESSES.items() if since <= version)
    rules = Ruleset(files, NETWORK[1] if version >= NETWORK[0] else 0, SCOPES[1] if version >= SCOPES[0] else 0)
    size = 8 if version < NETWORK[0] else 16 if version < SCOPES[0] else 24
    descriptor = _call(CREATE_RULESET, ctypes.byref(rules), ctypes.c_size_t(size), 0)
    for path in (*visible, *DEVICES):
        allowed = READ_FILE | (WRITE_FILE if path in DEVICES else EXECUTE)
        parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            if stat.S_ISDIR(os.fstat(parent).st_mode):
                allowed |= READ_DIR
            _call(ADD_RULE, descriptor, PATH_BENEATH, ctypes.byref(PathRule(allowed, parent)), 0)
        finally:
            os.close(parent)
    return descriptor


def restrict(descriptor: int) -> None:
    """Have this process keep to the rules, for good; it needs `no_new_privs`."""
    _call(RESTRICT_SELF, descriptor, 0)


def _call(number: int, *arguments: object) -> int:
    result = int(ctypes.CDLL(None, use_errno=True).syscall(number, *arguments))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "landlock")
    return result
