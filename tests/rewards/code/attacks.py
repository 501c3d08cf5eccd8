"""Attacks of a program on its sandbox: each prints DONE if it succeeds.

The numbers of system calls are those of this machine, and of jail_filter's table.
"""

import platform

from rekatrain.rewards.code import jail_filter

# ruff: noqa: E501
# A program in a table is read as one line.

COLUMN, _ = jail_filter.ARCHITECTURES[platform.machine()]
CALLS = {
    name: number
    for table in (
        *(jail_filter.ALWAYS, jail_filter.STARTS, jail_filter.OUTSIDE, jail_filter.MISSING),
        *(jail_filter.CLONE, jail_filter.PRCTL, jail_filter.SIGNALS, jail_filter.ITS_OWN, jail_filter.FCNTL),
    )
    for name, number in jail_filter.numbers(table, COLUMN).items()
}
PRELUDE = f"""
import ctypes, mmap, os, socket, sys, time
libc = ctypes.CDLL(None, use_errno=True)
CALLS = {CALLS!r}

def call(name, *arguments):
    '''Make a system call; raise OSError if it fails.'''
    number = CALLS.get(name, name)
    given = [ctypes.c_long(item) if isinstance(item, int) else item for item in arguments]
    result = libc.syscall(ctypes.c_long(number), *given)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
"""
# A program that leaves its session and is not signaled when its parent ends.
ESCAPE = "try: call('prctl', 1, 0, 0, 0, 0)\nexcept OSError: pass\ntry: os.setsid()\nexcept OSError: pass\n"
STAY = "\nos.close(1)\ntime.sleep(600)"

# Programs that try to live on, each beyond a limit of 1 second.
STAYING = {
    "leaves its session": ESCAPE + STAY,
    "forks": ESCAPE + "try:\n  if os.fork(): os._exit(0)\nexcept OSError: pass" + STAY,
    "forks twice": ESCAPE + "try:\n  if os.fork() or os.fork(): os._exit(0)\nexcept OSError: pass" + STAY,
    "clones by hand": ESCAPE + "try:\n  if call('clone', 17, 0, 0, 0, 0): os._exit(0)\nexcept OSError: pass" + STAY,
    "vforks": ESCAPE + "try: call('vfork')\nexcept (OSError, TypeError): pass" + STAY,
    "clones beside its parent": ESCAPE + "try: call('clone', 0x8000 | 17, 0, 0, 0, 0)\nexcept OSError: pass" + STAY,
    "starts a program": ESCAPE + "try: os.posix_spawn('/usr/bin/sleep', ['sleep', '600'], {})\nexcept OSError: pass" + STAY,
    "becomes another program": ESCAPE + "os.close(1)\nos.execv('/usr/bin/sleep', ['sleep', '600'])",
    "has a thread": ESCAPE + "import threading\nthreading.Thread(target=time.sleep, args=(600,)).start()" + STAY,
    "ends its main thread": ESCAPE
    + "import threading\nthreading.Thread(target=time.sleep, args=(600,)).start()\nos.close(1)\nlibc.pthread_exit(None)",
    "ignores signals": ESCAPE
    + "import signal\nfor s in range(1, 65):\n  try: signal.signal(s, signal.SIG_IGN)\n  except (OSError, ValueError): pass"
    + STAY,
    "spins": ESCAPE + "os.close(1)\nwhile True: pass",
    "signals all": ESCAPE + "import signal\nfor pid in (-1, 0, 1, os.getppid()):\n  try: os.kill(pid, 19)\n  except OSError: pass" + STAY,
    "traces its parent": ESCAPE + "try: call('ptrace', 16, os.getppid(), 0, 0)\nexcept OSError: pass" + STAY,
    "stops itself": ESCAPE + "os.kill(os.getpid(), 19)" + STAY,
}  # fmt: skip

LARGE = 700 << 20  # bytes; the limit of memory in the tests is 512 MiB
# Ways to more memory than the limit: each prints DONE if it holds all of it.
HOARDS = {
    "a list": f"x = bytearray({LARGE})",
    "shared memory of a map": f"m = mmap.mmap(-1, {LARGE})\nfor i in range(0, {LARGE}, 4096): m[i] = 1",
    "System V shared memory": (
        "libc.shmat.restype = ctypes.c_void_p\n"
        "for i in range(100):\n  n = call('shmget', 0, 8 << 20, 0o1600)\n  a = libc.shmat(n, None, 0)\n"
        "  ctypes.memset(a, 1, 8 << 20)\n  libc.shmdt(ctypes.c_void_p(a))"
    ),
    "POSIX shared memory": (
        "import _posixshmem\n"
        "for i in range(50):\n  f = _posixshmem.shm_open(f'/hoard{i}', os.O_CREAT | os.O_RDWR, mode=0o600)\n"
        "  os.write(f, bytes(16 << 20))\n  os.close(f)"
    ),
    "files in /dev/shm": "for i in range(50): open(f'/dev/shm/hoard{i}', 'wb').write(bytes(15 << 20))",
    "files in /tmp": "for i in range(50): open(f'/tmp/hoard{i}', 'wb').write(bytes(15 << 20))",
    "files in its folder": "for i in range(50): open(f'hoard{i}', 'wb').write(bytes(15 << 20))",
    "memfd": "f = os.memfd_create('x')\nfor i in range(50): os.write(f, bytes(15 << 20)); f = os.memfd_create('x')",
    "memfd_secret": "f = call('memfd_secret', 0)\nos.truncate(f, 1 << 20)",
    "its standard input": "f = os.dup(0)\nassert os.pwrite(f, bytes(1 << 20), 0)",
    "large pipes": (
        "import fcntl\nfor i in range(25):\n  r, w = os.pipe()\n  fcntl.fcntl(w, 1031, 1 << 20)\n"
        "  os.write(w, bytes(1 << 20))"
    ),
    "pages in pipes": (
        "for i in range(8):\n  r, w = os.pipe()\n  m = mmap.mmap(-1, 64 << 20)\n"
        "  address = ctypes.addressof(ctypes.c_char.from_buffer(m))\n"
        "  call('vmsplice', w, (ctypes.c_void_p * 2)(address, 1 << 16), 1, 8)"
    ),
    "sockets": "for i in range(20):\n  a, b = socket.socketpair(socket.AF_UNIX)\n  a.send(bytes(1 << 17))",
    "message queues": "call('msgget', 0, 0o1600)",
    "POSIX message queues": "call('mq_open', b'hoard', 0o102, 0o600, None)",
    "io_uring": "call('io_uring_setup', 4096, (ctypes.c_char * 120)())",
    "asynchronous input": "call('io_setup', 4096, (ctypes.c_char * 8)())",
    "children": (
        "for i in range(2):\n  if not os.fork():\n    x = bytearray(400 << 20)\n    time.sleep(2)\n    os._exit(0)\n"
    ),
    "keys": "for i in range(100): call('add_key', b'user', b'k%d' % i, bytes(30000), 30000, -3)",
    "a mount": "call('unshare', 0x10020000)\ncall('mount', b'x', b'/tmp', b'tmpfs', 0, b'size=2g')",
    "files without names": "for i in range(40):\n  f = os.open('.', os.O_TMPFILE | os.O_RDWR)\n  os.write(f, bytes(15 << 20))",
}  # fmt: skip

# Ways out; OUTSIDE is a process of the test, SECRET a file that anyone can read. `getpid` and such are real numbers.
WAYS_OUT = {
    "read a file": "open(SECRET).read()",
    "read a file by a link": "os.symlink(SECRET, 'link'); open('link').read()",
    "read a file by a hard link": "os.link(SECRET, 'link'); open('link').read()",
    "empty a file": "os.open(SECRET, os.O_RDONLY | os.O_TRUNC)",
    "cut a file": "os.truncate(SECRET, 0)",
    "change the mode of a file": "os.chmod(SECRET, 0)",
    "change the owner of a file": "os.chown(SECRET, os.getuid(), os.getgid())",
    "change the time of a file": "os.utime(SECRET)",
    "change attributes of a file": "os.setxattr(SECRET, 'user.x', b'1')",
    "delete a file": "os.unlink(SECRET)",
    "rename a file": "os.rename(SECRET, SECRET + '2')",
    "write beside a file": "open(SECRET + '2', 'w'); os.path.exists(SECRET)",
    "become another folder's root": "os.chroot('/usr'); os.chroot('..')",
    "list /": "[name for name in os.listdir('/') if name in ('work', 'proc', 'home')][0]",
    "list the folder of a file": "os.listdir(os.path.dirname(SECRET))",
    "watch a file": "call('inotify_init1', 0) >= 0",
    "write in /tmp": "open('/tmp/left-by-code', 'w'); os.path.exists('/proc') and 1 / 0",
    "write in /var/tmp": "open('/var/tmp/left-by-code', 'w')",
    "write in /dev/shm": "open('/dev/shm/left-by-code', 'w')",
    "write in /usr": "open('/usr/left-by-code', 'w')",
    "write in the home": "open('/root/left-by-code', 'w')",
    "read passwords": "open('/etc/passwd').read()",
    "list processes": "os.listdir('/proc')",
    "read the environment of the trainer": "open(f'/proc/{OUTSIDE}/environ', 'rb').read()",
    "read the command line of the trainer": "open(f'/proc/{OUTSIDE}/cmdline', 'rb').read()",
    "read the memory of the trainer": "open(f'/proc/{OUTSIDE}/mem', 'rb')",
    "read links of the trainer": "os.readlink(f'/proc/{OUTSIDE}/cwd')",
    "find files of the trainer": "os.listdir(f'/proc/{OUTSIDE}/fd')",
    "open a descriptor of another process": "[open(f'/proc/{p}/fd/{n}', 'wb') for p in range(2, 1 << 16) for n in (1, 2)]",
    "read the environment of its parent": "open(f'/proc/{os.getppid()}/environ', 'rb').read()",
    "signal the trainer": "os.kill(OUTSIDE, 0) is None",
    "signal its parent": "os.kill(os.getppid() or 1, 0) is None if os.getppid() != 1 else 1 / 0",
    "signal all": "os.kill(-1, 0) is None and 1 / 0",
    "signal a thread of the trainer": "call('tkill', OUTSIDE, 0) == 0",
    "signal the trainer with data": "call('rt_sigqueueinfo', OUTSIDE, 10, (ctypes.c_char * 128)()) == 0",
    "have a pipe signal the trainer": "__import__('fcntl').fcntl(os.pipe()[0], 8, OUTSIDE) == 0",
    "open the trainer": "os.pidfd_open(OUTSIDE)",
    "limit the trainer": "__import__('resource').prlimit(OUTSIDE, 0, (600, 600))",
    "slow the trainer": "os.setpriority(os.PRIO_PROCESS, OUTSIDE, 19) is None",
    "slow the trainer's disk": "call('ioprio_set', 1, OUTSIDE, 3 << 13) == 0",
    "pin the trainer": "os.sched_setaffinity(OUTSIDE, {0}) is None",
    "trace the trainer": "call('ptrace', 16, OUTSIDE, 0, 0) == 0",
    "read memory of another process": "call('process_vm_readv', OUTSIDE, None, 0, None, 0, 0) == 0",
    "compare itself with the trainer": "call('kcmp', OUTSIDE, os.getpid(), 1, 0, 0)",
    "read the session keyring": "call('keyctl', 11, call('keyctl', 10, -3, b'user', b'secret-of-the-test', 0), (ctypes.c_char * 99)(), 99)",
    "request a key": "call('request_key', b'user', b'secret-of-the-test', None, -3)",
    "join a named keyring": "call('keyctl', 1, b'joined')",
    "make a user namespace": "call('unshare', 0x10000000) == 0",
    "make a mount namespace": "call('unshare', 0x00020000) == 0",
    "make a thread in a namespace": "call('clone', 0x10000000 | 0x10f00, 0, 0, 0, 0)",
    "enter a namespace": "call('setns', 1, 0) == 0",
    "mount": "call('mount', b'x', b'/tmp', b'tmpfs', 0, None) == 0",
    "make a file system": "call('fsopen', b'tmpfs', 0)",
    "unmount": "call('umount2', b'/tmp', 2) == 0",
    "load a program into the kernel": "call('bpf', 0, (ctypes.c_char * 64)(), 64)",
    "handle page faults": "call('userfaultfd', 1)",
    "measure the kernel": "call('perf_event_open', (ctypes.c_char * 128)(), 0, -1, -1, 0)",
    "change its personality": "call('personality', 0x0040000) >= 0",
    "become dumpable": "call('prctl', 4, 1, 0, 0, 0) == 0",
    "outlive its parent": "call('prctl', 1, 0, 0, 0, 0) == 0",
    "raise its limit": "__import__('resource').setrlimit(9, (-1, -1)) is None",
    "become root": "os.setuid(0) is None and os.geteuid() == 0 and open(SECRET)",
    "connect to this machine": "socket.create_connection(('127.0.0.1', PORT), 1)",
    "find an address": "socket.getaddrinfo('example.com', 80)",
    "run a shell": "os.system('true') == 0",
    "start a process": "__import__('subprocess').run(['/usr/bin/true'])",
    "start a process of multiprocessing": "__import__('multiprocessing').get_context('fork').Process(target=print).start() is None",
}  # fmt: skip
WAYS_OUT |= {
    f"make a socket of family {family}": f"socket.socket({family}, {kind})"
    for family, kind in [
        (1, 1),
        (2, 1),
        (2, 2),
        (2, 3),
        (10, 1),
        (16, 3),
        (17, 3),
        (38, 5),
        (40, 1),
        (31, 3),
        (44, 3),
        (21, 5),
    ]
}


def attempt(action: str, **names: object) -> str:
    """Return a program that prints DONE if an expression, or the last of several, is true, else REFUSED and why."""
    *first, last = action.split("; ")
    given = "\n".join(f"{name} = {value!r}" for name, value in names.items())
    body = "".join(f"    {line}\n" for line in first)
    return (
        f"{PRELUDE}{given}\ntry:\n{body}    result = {last}\n    print('DONE' if result else 'REFUSED', repr(result)[:100])\n"
        "except BaseException as error:\n    print('REFUSED', type(error).__name__, error)"
    )


def hoard(way: str) -> str:
    """Return a program that prints DONE if it can hold memory in that way."""
    body = "".join(f"    {line}\n" for line in HOARDS[way].splitlines())
    return f"{PRELUDE}try:\n{body}    print('DONE')\nexcept BaseException as error:\n    print('REFUSED', type(error).__name__)"
