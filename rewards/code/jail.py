"""The inside of the sandbox: confine this process, then run a job in it. Started by sandbox.py only.

    python -I -S -B jail.py JOB_FD STATUS_FD [CHANNEL_FD ...]

A first process makes the namespaces and waits; a second one in them waits, too, and ends all others there when it ends;
a third one gives up all rights and runs the code.
It sees the interpreter's files, read only, and one small folder in memory, which is gone when it ends.
"""

import ctypes
import errno
import importlib
import json
import os
import resource
import signal
import sys

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
NAMESPACES = CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
CAPABILITY_VERSION = 0x20080522
NOBODY = 65534

libc = ctypes.CDLL(None, use_errno=True)


def main() -> None:
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    job_fd, status_fd, *channels = [int(text) for text in sys.argv[1:]]
    with os.fdopen(job_fd) as file:
        job = json.load(file)
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    # While its file can still be seen.
    jobs = importlib.import_module("jail_verifier" if job["kind"] == "verifier" else "jail_jobs")
    del sys.path[0]
    try:
        pid = confine(job)
    except (OSError, ValueError) as error:  # setrlimit raises the latter
        text = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) else str(error)
        os.write(status_fd, text.encode())
        os._exit(1)
    os.close(status_fd)
    if pid:  # the first process; the second one dies with it
        _, status = os.waitpid(pid, 0)
        os._exit(os.waitstatus_to_exitcode(status) % 256)
    jobs.run(job, channels)


def confine(job: dict) -> int:
    """Fork the confined process; return its id outside and 0 inside."""
    is_root = os.geteuid() == 0
    if job["isolation"] == "namespaces":
        if is_root:
            call("unshare", NAMESPACES)
        else:
            uid, gid = os.geteuid(), os.getegid()
            call("unshare", NAMESPACES | CLONE_NEWUSER)
            write("/proc/self/setgroups", "deny")
            write("/proc/self/uid_map", f"{NOBODY} {uid} 1")
            write("/proc/self/gid_map", f"{NOBODY} {gid} 1")
        make_root(job["visible"], job["folder_bytes"])
    else:
        os.chdir(job["folder"] or "/")
    pid = os.fork()
    if pid:
        return pid
    # The server of the verifiers is itself such an init process: it runs no code, only its children do.
    has_guard = job["isolation"] == "namespaces" and job["kind"] != "verifier"
    if has_guard:
        guard()
    if is_root:
        # A user id that nothing else has: the limit on processes counts by user, and only its own can be signaled.
        own = 1_000_000 + job["number"] % 1_000_000
        if job["folder"]:
            os.chown(job["folder"], own, own)
        os.setgroups([])
        os.setresgid(own, own, own)
        os.setresuid(own, own, own)
        if not os.access(os.__file__, os.R_OK):
            raise PermissionError(errno.EACCES, "other users than root cannot read Python's own files", os.__file__)
    else:
        drop_capabilities()
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if job["kind"] != "verifier":  # it forks a child for each answer, and gives each these limits
        limit(resource.RLIMIT_CPU, job["cpu_seconds"])
        num_own = 0 if is_root else 1 + has_guard  # the waiting processes have the same user
        limit(resource.RLIMIT_NPROC, job["processes"] + num_own)
    limit(resource.RLIMIT_AS, job["memory"])
    limit(resource.RLIMIT_FSIZE, job["file_bytes"])
    limit(resource.RLIMIT_NOFILE, 64)
    limit(resource.RLIMIT_CORE, 0)
    return 0


def guard() -> None:
    """Fork; wait in the first process, which is the init process of the namespace, and return in the second.

    With its init process the kernel ends all processes of a namespace. Code cannot signal it. Code that were the init
    process itself could leave the session and outlive its limit.
    """
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        os._exit(os.waitstatus_to_exitcode(status) % 256)


def make_root(visible: list[str], folder_bytes: int) -> None:
    """Replace the file tree by one in memory: `visible`, read only, and /tmp."""
    root = "/tmp"  # any folder that always exists; changed in this namespace only
    mount(None, "/", None, MS_REC | MS_PRIVATE, None)
    sources = {path: os.open(path, os.O_PATH | os.O_CLOEXEC) for path in visible}  # some may be below `root`
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m,nr_inodes=4096")
    os.makedirs(f"{root}/tmp")  # first: a path of `visible` may be below /tmp
    mount("tmpfs", f"{root}/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"mode=777,size={folder_bytes},nr_inodes=1024")
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
    os.chdir("/tmp")


def drop_capabilities() -> None:
    """Give up the capabilities that a new user namespace grants."""
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    call("capset", header, (ctypes.c_uint32 * 6)())


def limit(name: int, value: int) -> None:
    _, hard = resource.getrlimit(name)  # such as the memory limit of a reward worker, which cannot be raised
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(name, (value, value))


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None) -> None:
    arguments = [None if text is None else text.encode() for text in (source, target, kind)]
    call("mount", *arguments, ctypes.c_ulong(flags), None if options is None else options.encode(), name=target)


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def call(function: str, *arguments: object, name: str = "") -> None:
    if getattr(libc, function)(*arguments) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), f"{function} {name}")


if __name__ == "__main__":
    main()
