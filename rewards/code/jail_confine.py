"""Confine processes of the sandbox: namespaces or Landlock, separate users, limits, and the filter of calls."""

import ctypes
import errno
import importlib
import os
import resource
import signal
from typing import Any

# Beside this file, which is in no package inside the sandbox.
jail_filter: Any = importlib.import_module("jail_filter")
jail_landlock: Any = importlib.import_module("jail_landlock")

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS = 1, 8, 38
CAPABILITY_VERSION = 0x20080522
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2
JOIN_SESSION_KEYRING = 1
KEYCTL = {"x86_64": 250, "aarch64": 219}
NOBODY = 65534
FIRST_USER = 1 << 30  # of user ids that nothing else has
SPARE_TASKS = 64  # that the user may start elsewhere while code runs, without harm to it

libc = ctypes.CDLL(None, use_errno=True)


class Level:
    """An isolation of this machine, prepared once for all sandboxes of a server.

    proc: the folder /proc, open; rules: Landlock's, open, or -1 in namespaces
    """

    def __init__(self, isolation: str, visible: list[str], landlock: int | None) -> None:
        self.is_root = os.geteuid() == 0 and has_users()
        self.has_namespaces = isolation == "namespaces"
        self.proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self.rules = -1
        if self.has_namespaces:
            self.unshare(CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWNET)
            make_root(visible)
        else:
            self.rules = jail_landlock.make_rules(visible, min(jail_landlock.version(), landlock or 1 << 10))

    def unshare(self, namespaces: int) -> None:
        """Make namespaces for this process, with a user namespace that allows it if need be."""
        if self.is_root:
            return call("unshare", namespaces)
        uid, gid = os.geteuid(), os.getegid()
        call("unshare", namespaces | CLONE_NEWUSER)
        for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {uid} 1"), ("gid_map", f"{NOBODY} {gid} 1")):
            with open(os.open(f"self/{name}", os.O_WRONLY, dir_fd=self.proc), "w") as file:
                file.write(text)
        return None

    def separate(self, folder_bytes: int) -> None:
        """Give this process, and those that it starts, fresh namespaces and a fresh folder in memory."""
        if self.has_namespaces:
            self.unshare(CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWPID)
            mount("tmpfs", "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"mode=777,size={folder_bytes},nr_inodes=1024")
            os.chdir("/tmp")

    def confine(self, settings: dict[str, Any], keeper: int, num_keepers: int) -> None:
        """Give up all rights of this process but to run code.

        keeper: the process that watches this one; its number makes a user. num_keepers: processes of this one's user
        """
        if not self.has_namespaces:
            os.setsid()  # signals to its process group reach nobody else
        may_fork = settings["kind"] == "verifier"  # it starts a child for each answer, and gives each the rest
        if self.is_root:
            self._become(own_user(keeper))
        else:
            set_capabilities(0)
        die_with_parent()
        if not self.has_namespaces and os.getppid() != keeper:
            os._exit(1)  # it has ended before the kernel knew
        if not may_fork:
            limit(resource.RLIMIT_CPU, settings["cpu_seconds"])
            limit(resource.RLIMIT_NPROC, settings["processes"] + (0 if self.is_root else self._count(num_keepers)))
        limit(resource.RLIMIT_AS, settings["memory"])
        limit(resource.RLIMIT_FSIZE, settings["file_bytes"])
        limit(resource.RLIMIT_NOFILE, 64)
        limit(resource.RLIMIT_CORE, 0)
        call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        join_fresh_keyring()
        if self.rules >= 0:
            jail_landlock.restrict(self.rules)
        jail_filter.install(may_fork=may_fork, same_user=not self.has_namespaces)

    def _become(self, user: int) -> None:
        """Become a user that nothing else has: the limit on threads counts by user."""
        call("prctl", PR_SET_KEEPCAPS, 1, 0, 0, 0)
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
        if self.has_namespaces or os.access(os.__file__, os.R_OK):
            return set_capabilities(0)
        # Python is in a folder of root's. Landlock and the filter hold against this capability.
        for capability in (CAP_DAC_READ_SEARCH, CAP_DAC_OVERRIDE):
            try:
                return set_capabilities(1 << capability)
            except PermissionError:
                continue
        raise PermissionError(errno.EACCES, "other users than root cannot read Python's own files", os.__file__)

    def _count(self, num_keepers: int) -> int:
        """Return the number of tasks that count against the limit of this user beside its own."""
        if self.has_namespaces:
            return num_keepers
        user, tasks = os.geteuid(), 0
        for name in os.listdir("/proc"):
            try:
                if name.isdigit() and os.stat(f"/proc/{name}").st_uid == user:
                    tasks += len(os.listdir(f"/proc/{name}/task"))
            except OSError:  # it has ended
                continue
        return tasks + SPARE_TASKS


def make_root(visible: list[str]) -> None:
    """Replace the file tree by one in memory: `visible`, read only, and an empty /tmp."""
    root = "/tmp"  # any folder that always exists; changed in this namespace only
    mount(None, "/", None, MS_REC | MS_PRIVATE, None)
    sources = {path: os.open(path, os.O_PATH | os.O_CLOEXEC) for path in visible}  # some may be below `root`
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m,nr_inodes=4096")
    os.makedirs(f"{root}/tmp")
    for path, source in sources.items():
        is_folder = os.path.isdir(f"/proc/self/fd/{source}")
        os.makedirs(root + (path if is_folder else os.path.dirname(path)), exist_ok=True)
        if not is_folder:
            os.close(os.open(root + path, os.O_CREAT | os.O_WRONLY))
        mount(f"/proc/self/fd/{source}", root + path, None, MS_BIND | MS_REC, None)
        if not path.startswith("/dev/"):
            mount(None, root + path, None, MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV, None)
        os.close(source)
    for link in ("bin", "lib", "lib64"):
        if os.path.islink(f"/{link}"):
            os.symlink(os.readlink(f"/{link}"), f"{root}/{link}")
    os.chdir(root)
    mount(None, root, None, MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV, "mode=755,size=1m,nr_inodes=4096")
    call("pivot_root", b".", b".")
    call("umount2", b".", MNT_DETACH)
    os.chdir("/")


def has_users() -> bool:
    """Return True if this user namespace has the ids of `own_user`; a container may have few."""
    with open("/proc/self/uid_map") as file:
        ranges = [[int(number) for number in line.split()] for line in file]
    return any(first <= FIRST_USER and first + size > FIRST_USER + (1 << 22) for first, _, size in ranges)


def own_user(keeper: int) -> int:
    """Return a user id for the sandbox of a keeper: no other living process has it, as its number is unique."""
    return FIRST_USER + keeper


def die_with_parent() -> None:
    """Have the kernel end this process when its parent ends."""
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def set_capabilities(bits: int) -> None:
    """Keep these capabilities and give up the others, such as those that a new user namespace grants."""
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    call("capset", header, (ctypes.c_uint32 * 6)(bits, bits, 0))


def join_fresh_keyring() -> None:
    """Leave the session keyring of the trainer. Where that is forbidden, the filter forbids the use of any, too."""
    number = KEYCTL.get(os.uname().machine)
    if number is not None:
        libc.syscall(number, JOIN_SESSION_KEYRING, None)


def limit(name: int, value: int) -> None:
    """Set a limit, hard and soft, not above the one of a reward worker, which cannot be raised."""
    _, hard = resource.getrlimit(name)
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(name, (value, value))


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None) -> None:
    arguments = [None if text is None else text.encode() for text in (source, target, kind)]
    call("mount", *arguments, ctypes.c_ulong(flags), None if options is None else options.encode(), name=target)


def call(function: str, *arguments: object, name: str = "") -> None:
    """Call a function of the C library; raise OSError if it fails."""
    if getattr(libc, function)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), f"{function} {name}")
