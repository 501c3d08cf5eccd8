"""InputError: the error that a user can fix by changing an input."""

# Exit status of an interrupted run. EX_TEMPFAIL of sysexits.h: the same command can go on later.
INTERRUPTED = 75


class InputError(ValueError):
    """Raised for an invalid recipe, file, row or folder. Its message is one line that names the problem and the fix."""


class TrainingStopped(RuntimeError):
    """A guard ended a run; the message says why, where the evidence is, and how to go on."""


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its class where it has none."""
    return next(iter(str(error).splitlines()), type(error).__name__)


class RunInterrupted(TrainingStopped):
    """A signal or the time limit ended a run early; it can be resumed. The message says what is saved."""
