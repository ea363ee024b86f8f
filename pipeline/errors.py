"""The two exceptions that end a command early on purpose, and messages for a lack of memory or disk space."""

import errno

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})  # lack of space, as opposed to faulty input


class UserError(Exception):
    """An error that the user can fix: the message says what is wrong and what to do next. Exit code 1."""


class Interrupted(Exception):
    """A signal stopped the work between two steps; `message` says after which. Exit code 128 + signal.

    `resumes`: whether the same command goes on from there.
    """

    def __init__(self, signal_number: int, message: str, resumes: bool = True) -> None:
        super().__init__(message)
        self.signal_number, self.resumes = signal_number, resumes


_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # messages of CUDA, MPS and CPU


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on any device. Decided by the message, so that torch need not be imported."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's message, cut to 300 characters; its type if it has no message."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def explain(error: OSError) -> str:
    """Such as `No space left on device: PATH. Free some space.` The reason comes first: tables may cut the rest."""
    path = f": {error.filename}" if error.filename else ""
    return f"{error.strerror or error}{path}.{' Free some space.' if error.errno in FULL else ''}"
