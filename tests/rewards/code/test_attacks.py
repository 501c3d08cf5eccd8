"""Attacks on the sandbox: no program gets out, holds more memory than its limit, lives on, or forges a verdict.

Each is tried at both levels of isolation, by the user of the tests and, as root, by another user.
"""

import functools
import os
import platform
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rekatrain.rewards.code import jail_filter, launcher
from rekatrain.rewards.code.sandbox import run_program
from tests.rewards.code import attacks, users

LEVELS = ("namespaces", "rlimits")
USERS = (0, users.OTHER_USER) if os.geteuid() == 0 else (0,)
MEMORY = 512 << 20
MACHINE_CODE = {
    # An old way into the kernel with 32-bit numbers: mov eax, 20; int 0x80; ret
    "32-bit numbers": "b'\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3'",
    # The x32 interface: mov eax, 0x40000027; syscall; ret
    "x32 numbers": "b'\\xb8\\x27\\x00\\x00\\x40\\x0f\\x05\\xc3'",
}


class Place:
    """A level of isolation and a user, with a process that runs programs there."""

    def __init__(self, level: str, runner: users.Runner, secret: Path, port: int) -> None:
        self.level, self.runner, self.secret, self.port = level, runner, secret, port

    @functools.cached_property
    def ways_out(self) -> dict[str, str]:
        """The output of each attack of WAYS_OUT."""
        names = {"OUTSIDE": self.runner.victim, "SECRET": str(self.secret), "PORT": self.port}
        programs = [attacks.attempt(action, **names) for action in attacks.WAYS_OUT.values()]
        return dict(zip(attacks.WAYS_OUT, self.outputs(programs), strict=True))

    @functools.cached_property
    def hoards(self) -> dict[str, str]:
        """The output of each attack of HOARDS."""
        return dict(zip(attacks.HOARDS, self.outputs([attacks.hoard(way) for way in attacks.HOARDS]), strict=True))

    def outputs(self, programs: list[str]) -> list[str]:
        """Return the output of programs, or how they ended without one."""
        outcomes = self.runner.programs(self.level, programs, seconds=20, memory=MEMORY, processes=4)
        return [output or f"{ending} {code}" for ending, code, output in outcomes]


@pytest.fixture(scope="module", params=[(level, user) for level in LEVELS for user in USERS], ids=str)
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    level, user = request.param
    folder = Path(f"/var/tmp/sandbox-test-{os.getpid()}")  # every user can get there, unlike to the tests' own folder
    folder.mkdir(exist_ok=True)
    secret = folder / "secret"
    secret.write_text("secret")
    for path in (secret, folder):
        os.chmod(path, 0o755)
        os.chown(path, user or os.geteuid(), user or os.getegid())
    with users.running(user) as runner, socket.create_server(("127.0.0.1", 0)) as server:
        yield Place(level, runner, secret, server.getsockname()[1])
    secret.unlink()
    folder.rmdir()


@pytest.mark.parametrize("way", attacks.WAYS_OUT)
def test_attack_finds_no_way_out(place: Place, way: str) -> None:
    assert place.ways_out[way].startswith("REFUSED"), place.ways_out[way]
    # An attack with a mistake in it shows nothing.
    assert not re.search("NameError|SyntaxError|TypeError|AttributeError", place.ways_out[way])


def test_attack_leaves_files_as_they_were(place: Place) -> None:
    assert place.ways_out and place.secret.read_text() == "secret"
    assert place.secret.stat().st_mode & 0o777 == 0o755
    assert os.listdir(place.secret.parent) == ["secret"]
    assert not [path for path in ("/tmp", "/var/tmp", "/dev/shm") if os.path.exists(f"{path}/left-by-code")]


@pytest.mark.parametrize("way", attacks.HOARDS)
def test_attack_holds_no_memory_beyond_the_limit(place: Place, way: str) -> None:
    # A write beyond the limit of files may also end the program by a signal.
    assert "DONE" not in place.hoards[way]
    assert place.hoards[way].startswith("REFUSED") or re.fullmatch("exited [1-9].*", place.hoards[way])


def test_attack_leaves_no_memory_behind(place: Place) -> None:
    def held() -> tuple[int, list[str]]:
        segments = Path("/proc/sysvipc/shm").read_text().splitlines()[1:]
        return sum(int(line.split()[3]) for line in segments), sorted(Path("/dev/shm").glob("hoard*"))  # type: ignore[type-var]

    before = held()
    assert place.hoards and held() == before


def test_attack_calls_are_denied_by_number(place: Place) -> None:
    """Each call of the filter's tables, and those that the kernel may get in the future."""
    names = [
        *jail_filter.numbers(jail_filter.ALWAYS, attacks.COLUMN),
        *jail_filter.numbers(jail_filter.STARTS, attacks.COLUMN),
    ]
    if place.level == "rlimits":
        names += jail_filter.numbers(jail_filter.OUTSIDE, attacks.COLUMN)
    program = (
        f"{attacks.PRELUDE}for name in {[*names, 'clone3', 463, 500, 1023]!r}:\n"
        "  result = libc.syscall(ctypes.c_long(CALLS.get(name, name)), *[ctypes.c_long(-1)] * 6)\n"
        "  print(name, result, ctypes.get_errno())\n"
    )
    lines = place.outputs([program])[0].splitlines()
    assert lines == [*[f"{name} -1 1" for name in names], *[f"{name} -1 38" for name in ("clone3", 463, 500, 1023)]]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="machine code of x86_64")
@pytest.mark.parametrize("kind", MACHINE_CODE)
def test_attack_by_numbers_of_another_interface_ends(place: Place, kind: str) -> None:
    program = (
        f"{attacks.PRELUDE}m = mmap.mmap(-1, 4096, prot=7)\nm.write({MACHINE_CODE[kind]})\n"
        "print('start', flush=True)\n"
        "ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(m)))()\nprint('DONE')"
    )
    ((ending, code, output),) = place.runner.programs(place.level, [program], seconds=20)
    assert (ending, code % 256, output) == ("exited", 256 - signal.SIGSYS, "start\n")


def test_filter_has_the_numbers_of_the_kernel() -> None:
    header = Path("/usr/include/asm-generic/unistd.h")
    headers = [*Path("/usr/include").glob("*/asm/unistd_64.h"), header]
    for column, path in enumerate(headers if header.exists() and platform.machine() == "x86_64" else []):
        known = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", path.read_text()))
        for table in (jail_filter.ALWAYS, jail_filter.STARTS, jail_filter.OUTSIDE, jail_filter.ITS_OWN):
            numbers = jail_filter.numbers(table, column)
            assert {name: int(known[name]) for name in numbers if name in known} == {
                name: number for name, number in numbers.items() if name in known
            }


def test_attack_outlives_no_time_limit(place: Place) -> None:
    place.outputs(["print(1)"])
    before = users.sandbox_processes()
    programs = [attacks.PRELUDE + program for program in attacks.STAYING.values()]
    started = time.monotonic()
    outcomes = place.runner.programs(place.level, programs, seconds=0.5, processes=4)
    assert {
        name: ending for name, (ending, _, _) in zip(attacks.STAYING, outcomes, strict=True) if ending != "time"
    } == {}
    assert time.monotonic() - started < 0.5 * len(programs) / 4 + 10
    users.wait_until_gone(before)


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["worker", "server", "keeper", "all but the code"])
@pytest.mark.parametrize("level", LEVELS)
def test_attack_outlives_no_process_that_watches_it(level: str, killed: str) -> None:
    """The processes that watch the code are killed while it runs, in the order in which they started."""
    before = users.sandbox_processes()
    with users.running() as runner:
        runner.send("programs", level, [attacks.PRELUDE + attacks.STAYING["leaves its session"]], seconds=600)
        depth = 4 if level == "namespaces" else 3  # server, keeper, perhaps init, code
        deadline = time.monotonic() + 30
        while len(mine := sorted(users.sandbox_processes() - before, key=int)) < depth:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.3)  # the program begins
        victims = {"worker": [], "server": mine[:1], "keeper": mine[1:2], "all but the code": mine[:-1]}[killed]
        for pid in victims:
            os.kill(int(pid), signal.SIGKILL)
        if killed in ("worker", "all but the code"):
            runner.process.kill()
        elif killed == "server":
            ((ending, _, message),) = runner.read()
            assert (ending, message) == ("error", "RewardError: the sandbox was killed from outside")
        users.wait_until_gone(before | (set(mine[:1]) if killed == "keeper" else set()))


FORGED = {
    "descriptors of other processes": (
        "import os\ndef double(x): return 0\n"
        "for p in list(range(1, 400)) + list(range(os.getpid() - 60, os.getpid() + 60)):\n"
        "  for n in range(12):\n"
        "    try: os.write(os.open(f'/proc/{p}/fd/{n}', os.O_WRONLY | os.O_NONBLOCK), b'11')\n"
        "    except OSError: pass"
    ),
    "the memory of the tests": (
        "import os\ndef double(x):\n"
        "  for p in range(os.getpid() - 60, os.getpid() + 60):\n"
        "    try: open(f'/proc/{p}/mem', 'rb+').close()\n"
        "    except OSError: continue\n"
        "    if p != os.getpid(): return 4 if x == 2 else [1, 1]\n"
    ),
    "a signal to the tests": (
        "import os\ndef double(x):\n"
        "  for p in range(os.getpid() - 60, os.getpid() + 60):\n"
        "    if p > 1 and p != os.getpid():\n"
        "      try: os.kill(p, 0)\n      except OSError: continue\n"
        "      return 4 if x == 2 else [1, 1]\n"
    ),
}


@pytest.mark.parametrize("way", FORGED)
def test_attack_forges_no_verdict(place: Place, way: str) -> None:
    tests = {"asserts": ["assert double(2) == 4", "assert double([1]) == [1, 1]"]}
    given = {**tests, "setup": "", "prefix": "", "entry_point": ""}
    right = "def double(x): return x * 2"
    assert place.runner.tests(place.level, [right, FORGED[way]], given, seconds=20) == [[True, True], [False, False]]


@pytest.mark.parametrize("version", [1, 3, 5])
def test_attack_finds_no_way_out_by_an_older_landlock(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Older kernels deny fewer kinds of access by Landlock; the filter of calls denies the rest."""
    monkeypatch.setattr(launcher, "LANDLOCK", version)
    monkeypatch.setattr(launcher, "_servers", {})
    secret = tmp_path / "secret"
    secret.write_text("secret")
    won = {}
    for way, action in attacks.WAYS_OUT.items():
        if re.search("SECRET|proc|OUTSIDE|write|socket", action):
            program = attacks.attempt(action, SECRET=str(secret), OUTSIDE=os.getpid(), PORT=1)
            limits = launcher.Limits(seconds=20, memory=MEMORY)
            output = run_program(program, stdin=b"", limits=limits, isolation="rlimits").output
            if not output.startswith(b"REFUSED"):
                won[way] = output
    assert won == {} and secret.read_text() == "secret"
    for server in launcher._servers.values():
        server.close()


def test_level_is_refused_where_the_machine_cannot_provide_it() -> None:
    """As in a container without the right to make namespaces, and on a kernel without Landlock."""
    unshare, landlock = attacks.CALLS["unshare"], 444
    sum_up = {"processes": 2, "seconds": 20}
    with users.running(denied=[unshare]) as runner:
        assert runner.programs("namespaces", ["print(1)"], **sum_up) == [
            ("error", 0, "RewardError: the sandbox could not be made: Operation not permitted: unshare ")
        ]
        assert runner.programs("rlimits", ["print(1)"], **sum_up) == [("exited", 0, "1\n")]
    with users.running(denied=[landlock]) as runner:
        assert runner.programs("rlimits", ["print(1)"], **sum_up) == [
            ("error", 0, "RewardError: the sandbox could not be made: Operation not permitted: landlock")
        ]
        assert runner.programs("namespaces", ["print(1)"], **sum_up) == [("exited", 0, "1\n")]
