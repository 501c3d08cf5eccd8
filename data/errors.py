"""The one error that means: the user can mend this."""


class InputError(ValueError):
    """A recipe, a file, a row or a folder is not what it must be; the message is one line that says what to do."""
