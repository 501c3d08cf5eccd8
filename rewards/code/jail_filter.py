"""The system calls that code in a sandbox cannot make: a seccomp filter, made of BPF instructions by ctypes.

libseccomp would write the filter from names, but it is no part of a Python installation; the rules fit on one page.
A call that is not named here, and that this file knows of, is allowed: packages need many. Newer ones do not exist.
"""

import ctypes
import errno
import os
import platform
import struct

PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS, MODE_FILTER = 22, 38, 2
KILL, ERRNO, ALLOW = 0x80000000, 0x00050000, 0x7FFF0000  # linux/seccomp.h
LOAD, AND, EQUAL, GREATER_EQUAL, RETURN = 0x20, 0x54, 0x15, 0x35, 0x06  # linux/bpf_common.h
ARCHITECTURE, NUMBER, FIRST_ARGUMENT = 4, 0, 16  # offsets in struct seccomp_data
X32 = 0x40000000  # numbers of the x32 interface, which would get past the numbers here
FIRST_UNKNOWN = 463
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the table, audit number
CLONE_THREAD, CLONE_NAMESPACES = 0x00010000, 0x7E020080

# Name, number on x86_64, number on aarch64.
ALWAYS = """
shmget 29 194, shmat 30 196, shmctl 31 195, shmdt 67 197, semget 64 190, semop 65 193, semctl 66 191,
semtimedop 220 192, msgget 68 186, msgsnd 69 189, msgrcv 70 188, msgctl 71 187, mq_open 240 180, mq_unlink 241 181,
mq_timedsend 242 182, mq_timedreceive 243 183, mq_notify 244 184, mq_getsetattr 245 185,
memfd_create 319 279, memfd_secret 447 447, vmsplice 278 75, io_setup 206 0, io_submit 209 2,
io_uring_setup 425 425, io_uring_enter 426 426, io_uring_register 427 427,
socket 41 198, socketpair 53 199, keyctl 250 219, add_key 248 217, request_key 249 218,
unshare 272 97, setns 308 268, chroot 161 51, pivot_root 155 41, mount 165 40, umount2 166 39, fsopen 430 430,
fsconfig 431 431, fsmount 432 432, fspick 433 433, open_tree 428 428, move_mount 429 429, mount_setattr 442 442,
ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271, process_madvise 440 440, process_mrelease 448 448,
pidfd_open 434 434, pidfd_getfd 438 438, pidfd_send_signal 424 424, kcmp 312 272, migrate_pages 256 238,
move_pages 279 239, bpf 321 280, perf_event_open 298 241, userfaultfd 323 282, fanotify_init 300 262,
inotify_init 253 -, inotify_init1 294 26, name_to_handle_at 303 264, open_by_handle_at 304 265,
quotactl 179 60, quotactl_fd 443 443, personality 135 92,
kexec_load 246 104, kexec_file_load 320 294, reboot 169 142, init_module 175 105, finit_module 313 273,
delete_module 176 106, swapon 167 224, swapoff 168 225, acct 163 89, syslog 103 116, iopl 172 -, ioperm 173 -,
uselib 134 -, modify_ldt 154 -, settimeofday 164 170, clock_settime 227 112, adjtimex 159 171, clock_adjtime 305 266,
sethostname 170 161, setdomainname 171 162, vhangup 153 58, lookup_dcookie 212 18
"""
# Calls that start a process. A program has threads only, so that its memory is that of one address space.
STARTS = "fork 57 -, vfork 58 -"
# Calls by which a process changes files that it cannot open, or processes of its user; Landlock does not know them.
OUTSIDE = """
chmod 90 -, fchmod 91 52, fchmodat 268 53, fchmodat2 452 452, chown 92 -, fchown 93 55, lchown 94 -, fchownat 260 54,
utime 132 -, utimes 235 -, futimesat 261 -, utimensat 280 88, setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7,
removexattr 197 14, lremovexattr 198 15, fremovexattr 199 16, truncate 76 45,
tkill 200 130, rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240, setpriority 141 140, ioprio_set 251 30,
openat2 437 437, creat 85 -
"""
MISSING = "clone3 435 435"  # its flags are in memory: the C library then uses clone
PRCTL, FCNTL, CLONE = "prctl 157 167", "fcntl 72 25", "clone 56 220"
DENIED_OPTIONS = (1, 4, 35)  # PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_MM
# F_SETOWN, F_SETSIG, F_SETOWN_EX: signals to other processes. F_SETPIPE_SZ: memory that is not in the address space.
DENIED_COMMANDS = (8, 10, 15, 1031)
SIGNALS = "kill 62 129, tgkill 234 131"
# Calls on a process whose number is the first argument.
ITS_OWN = """prlimit64 302 261, sched_setaffinity 203 122, sched_setparam 142 118, sched_setscheduler 144 119,
sched_setattr 314 274"""
OPEN, OPENAT = "open 2 -", "openat 257 56"
ACCESS_MODE, TRUNCATE = 0o3, 0o1000


def install(*, may_fork: bool, same_user: bool) -> None:
    """Install the filter in this process, for good.

    may_fork:  allow child processes and the options of prctl; each child installs a stricter filter
    same_user: deny also what reaches files or processes without a separate file tree and process numbers
    """
    program = build(may_fork=may_fork, own_pid=os.getpid() if same_user else None)
    instructions = ctypes.create_string_buffer(program, len(program))
    libc = ctypes.CDLL(None, use_errno=True)
    # struct sock_fprog: the number of instructions and their address
    pointer = struct.pack("@HP", len(program) // 8, ctypes.addressof(instructions))
    for arguments in ((PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (PR_SET_SECCOMP, MODE_FILTER, pointer, 0, 0)):
        if libc.prctl(*arguments) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "prctl seccomp")


def build(*, may_fork: bool, own_pid: int | None) -> bytes:
    """Return the instructions, 8 bytes each, for this machine; raise OSError for an architecture without a table."""
    machine = platform.machine()
    if machine not in ARCHITECTURES:
        raise OSError(errno.ENOSYS, f"there is no table of system calls for {machine}", "seccomp")
    column, audit = ARCHITECTURES[machine]
    code = [
        _step(LOAD, ARCHITECTURE),
        _step(EQUAL, audit, 1, 0),
        _step(RETURN, KILL),
        _step(LOAD, NUMBER),
        _step(GREATER_EQUAL, X32, 0, 1),
        _step(RETURN, KILL),
        _step(GREATER_EQUAL, FIRST_UNKNOWN, 0, 1),
        _step(RETURN, ERRNO | errno.ENOSYS),
    ]
    code += _deny(MISSING, column, errno.ENOSYS) + _deny(ALWAYS, column)
    code += _where(FCNTL, column, 1, [(0xFFFFFFFF, command) for command in DENIED_COMMANDS], is_allowed=False)
    if may_fork:
        code += _where(CLONE, column, 0, [(CLONE_NAMESPACES, 0)], is_allowed=True)
    else:
        code += _deny(STARTS, column)
        code += _where(PRCTL, column, 0, [(0xFFFFFFFF, option) for option in DENIED_OPTIONS], is_allowed=False)
        code += _where(CLONE, column, 0, [(CLONE_THREAD | CLONE_NAMESPACES, CLONE_THREAD)], is_allowed=True)
    if own_pid is not None:
        code += _deny(OUTSIDE, column)
        # A file that can be read would be emptied by O_TRUNC.
        emptied = [(ACCESS_MODE | TRUNCATE, TRUNCATE)]
        code += _where(OPEN, column, 1, emptied, is_allowed=False) + _where(
            OPENAT, column, 2, emptied, is_allowed=False
        )
        own = [(0xFFFFFFFF, 0), (0xFFFFFFFF, own_pid)]
        code += _where(ITS_OWN, column, 0, own, is_allowed=True)
        if not may_fork:  # the server of the verifiers ends its children
            code += _where(SIGNALS, column, 0, own, is_allowed=True)
    return b"".join([*code, _step(RETURN, ALLOW)])


def numbers(table: str, column: int) -> dict[str, int]:
    """Return the numbers of the calls of a table on one architecture."""
    rows = [entry.split() for entry in table.split(",")]
    return {row[0]: int(row[1 + column]) for row in rows if row[1 + column] != "-"}


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _deny(table: str, column: int, error: int = errno.EPERM) -> list[bytes]:
    refuse = _step(RETURN, ERRNO | error)
    return [step for number in numbers(table, column).values() for step in (_step(EQUAL, number, 0, 1), refuse)]


def _where(table: str, column: int, argument: int, cases: list[tuple[int, int]], *, is_allowed: bool) -> list[bytes]:
    """Return steps that allow, or deny, the calls of which an argument has one of these values under a mask.

    The lower 32 bits are compared: the kernel reads these arguments so, and both machines store them first.
    """
    body = []
    for mask, value in cases:
        body += [_step(LOAD, FIRST_ARGUMENT + 8 * argument), _step(AND, mask), _step(EQUAL, value, 0, 1)]
        body.append(_step(RETURN, ALLOW if is_allowed else ERRNO | errno.EPERM))
    body.append(_step(RETURN, ERRNO | errno.EPERM if is_allowed else ALLOW))
    return [step for number in numbers(table, column).values() for step in (_step(EQUAL, number, 0, len(body)), *body)]
