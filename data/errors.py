"""InputError: the error that a user can fix by changing an input."""


class InputError(ValueError):
    """Raised for an invalid recipe, file, row or folder. Its message is one line that names the problem and the fix."""


class TrainingStopped(RuntimeError):
    """A guard ended a run; the message says why, where the evidence is, and how to go on."""
