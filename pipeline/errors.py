"""The two ways a command ends early on purpose, and what is said of a file that cannot be written."""

import errno

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})  # no room, rather than something wrong with what is read


class UserError(Exception):
    """Something the user can mend: the message says what, and what to do next. Exit code 1."""


class Interrupted(Exception):
    """A signal stopped the work at a step boundary; `message` says what was kept. Exit code 128 + signal."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number


def explain(error: OSError) -> str:
    """`No space left on device: PATH. Free some space.`: the reason first, since a list may cut the rest.

    Not every error has a path.
    """
    path = f": {error.filename}" if error.filename else ""
    return f"{error.strerror or error}{path}.{' Free some space.' if error.errno in FULL else ''}"
