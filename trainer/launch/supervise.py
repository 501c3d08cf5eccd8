"""Run a launch: start servers and trainers, watch them, hand signals on, and end all of them."""

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

import psutil

from rekatrain.data.errors import INTERRUPTED, TrainingStopped
from rekatrain.trainer.launch.keep import adopt_orphans, kill_descendants
from rekatrain.trainer.launch.output import Output
from rekatrain.trainer.launch.processes import END_LINES, Command, Kept
from rekatrain.trainer.launch.servers import Servers

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
POLL_SECONDS = 0.1
# Seconds until a process that got SIGTERM is killed: a server at the end of a run; a trainer after another one has
# failed, which it notices within seconds; and a trainer after a second signal, at which it ends without a checkpoint.
SERVER_END_SECONDS = 15.0
TRAINER_END_SECONDS = 60.0
TRAINER_KILL_SECONDS = 10.0
# Seconds until a server that a trainer found gone must be seen to have ended.
SERVER_DEATH_SECONDS = 3.0


class Supervisor:
    """The processes of one launch."""

    def __init__(
        self, servers: Servers, trainers: Sequence[Command], output: Output, *, restarts_trainers: bool = False
    ) -> None:
        """Store the settings; nothing is started.

        trainers:          commands of the training processes, one per node
        restarts_trainers: True if a server needs the trainers' GPUs to start: they then save and end, and resume after
        """
        self._servers, self._trainers, self._output = servers, trainers, output
        self._restarts_trainers = restarts_trainers
        self._running: list[Kept] = []
        self._signals: list[signal.Signals] = []
        self._sent: list[signal.Signals] = []  # to those that are running
        self._others = {child.pid for child in psutil.Process().children()}

    def run(self) -> int:
        """Run everything until the trainers have ended -> their exit status; 75 after a signal before their start.

        Raises TrainingStopped if a server cannot be started, or dies too often. Nothing that was started is left.
        """
        adopt_orphans()
        with self._listen():
            try:
                resumes = False
                while True:
                    self._servers.start()
                    while not self._servers.are_ready():
                        if self._signals:
                            return self._say_interrupted()
                        self._show(f"waiting for {len(self._servers.servers)} vLLM server(s)")
                        time.sleep(POLL_SECONDS)
                    status = self._train(resumes=resumes)
                    if status is not None:
                        return status
                    self._end_servers()  # all: a resumed run needs servers that are awake
                    resumes = True
            finally:
                self._end_all()

    def _train(self, *, resumes: bool) -> int | None:
        """Run the trainers to their end -> their status; None if they have ended for a server, and resume after."""
        commands = [_resuming(command) if resumes else command for command in self._trainers]
        self._running, self._sent = [Kept(command, self._output.line) for command in commands], []
        num_seen, deadline, first_failed = len(self._signals), float("inf"), 0
        failure: TrainingStopped | None = None
        is_paused = False
        while (statuses := [self._status(kept) for kept in self._running]).count(None):
            self._show("training")
            failed = [status for status in statuses if status not in (None, 0, INTERRUPTED)]
            if failed and not first_failed:
                first_failed = failed[0] or 0
                deadline = time.monotonic() + TRAINER_END_SECONDS
            for number in self._signals[num_seen:]:
                num_seen += 1
                if not any(kept.lines for kept in self._running):
                    for kept in self._running:  # they import their libraries, and would print a traceback
                        kept.end()
                    return self._say_interrupted()
                self._send(signal.SIGTERM if number is signal.SIGHUP else number)
                if num_seen > 1:
                    deadline = time.monotonic() + TRAINER_KILL_SECONDS
            if time.monotonic() > deadline:
                for kept in self._running:
                    kept.end()
            if failure is None and not is_paused:
                try:
                    is_paused = self._replace_dead_servers()
                except TrainingStopped as error:
                    failure = error
                if failure is not None or is_paused:
                    self._send(signal.SIGTERM)
            self._servers.check_health()
            time.sleep(POLL_SECONDS)
        ended = [status for status in statuses if status is not None]
        first_failed = first_failed or next((status for status in ended if status not in (0, INTERRUPTED)), 0)
        if failure is not None and INTERRUPTED in ended:
            raise failure
        # A trainer that finds the server gone fails before it gets the signal: it resumes too.
        if self._restarts_trainers and not is_paused and first_failed:
            is_paused = self._finds_dead_server()
        if is_paused and not self._signals and any(ended):
            return None
        if not first_failed and INTERRUPTED in ended and not any(_says_why(kept) for kept in self._running):
            return self._say_interrupted()
        for kept, status in zip(self._running, ended, strict=True):
            if status == first_failed > 128 and not any("rekatrain: " in line for line in [*kept.lines][-END_LINES:]):
                self._output.say(f"{kept.name} ended with status {status}: {kept.reason()}. Go on with --resume")
        return first_failed or max(ended)

    def _status(self, kept: Kept) -> int | None:
        """Return the exit status of a trainer; one that its first signal ends has not begun to listen for it."""
        status = kept.poll()
        return INTERRUPTED if status is not None and [status - 128] == self._sent else status

    def _say_interrupted(self) -> int:
        name = self._signals[0].name if self._signals else "a server's end"
        self._output.say(f"interrupted by {name} before its first step: nothing is lost. Start it again with --resume")
        return INTERRUPTED

    def _replace_dead_servers(self) -> bool:
        """Start dead servers again -> True if the trainers must end first."""
        if not self._servers.find_dead():
            return False
        running = {kept.pid for kept in (*self._servers.kept, *self._running)}
        kill_descendants(spared=self._others | running)  # what a server has left whose keeper was killed
        if not self._restarts_trainers:
            self._servers.start()
        return self._restarts_trainers

    def _finds_dead_server(self) -> bool:
        """Wait a little for a server to have ended: the program that keeps it ends after it."""
        deadline = time.monotonic() + SERVER_DEATH_SECONDS
        while not self._servers.find_dead():
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def _send(self, number: signal.Signals) -> None:
        self._sent.append(number)
        for kept in self._running:
            kept.send(number)

    def _show(self, phase: str) -> None:
        self._output.status(phase, self._servers.describe())

    @contextmanager
    def _listen(self) -> Iterator[None]:
        """Collect the signals of this process."""

        def collect(number: int, frame: FrameType | None) -> None:
            self._signals.append(signal.Signals(number))

        # One that is ignored, by nohup for example, stays so.
        wanted = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        old = {number: signal.signal(number, collect) for number in wanted}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    def _end_servers(self) -> None:
        self._output.hides_servers = True
        for server in self._servers.servers:
            if server.kept is not None:
                # One that is being started has nothing to clean up, and does not listen yet.
                server.kept.send(signal.SIGTERM) if server.is_up else server.kept.end()
        deadline = time.monotonic() + SERVER_END_SECONDS
        while time.monotonic() < deadline and any(kept.poll() is None for kept in self._servers.kept):
            time.sleep(POLL_SECONDS)
        for kept in self._servers.kept:
            kept.end()
            kept.wait(SERVER_END_SECONDS)
        self._output.hides_servers = False

    def _end_all(self) -> None:
        """Kill trainers that run still, end the servers, then kill whatever is left."""
        for kept in self._running:
            kept.end()
        self._end_servers()
        for kept in self._running:
            kept.wait(SERVER_END_SECONDS)
        kill_descendants(spared=self._others)
        self._output.close()


def _says_why(kept: Kept) -> bool:
    return any("rekatrain: interrupted by" in line for line in kept.lines)


def _resuming(command: Command) -> Command:
    argv = [*command.argv] if "--resume" in command.argv else [*command.argv, "--resume"]
    return Command(**{**vars(command), "argv": argv})
