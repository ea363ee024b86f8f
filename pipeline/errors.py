"""The two ways a command ends early on purpose, and what is said where memory or disk run out."""

import errno

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})  # no room, rather than something wrong with what is read


class UserError(Exception):
    """Something the user can mend: the message says what, and what to do next. Exit code 1."""


class Interrupted(Exception):
    """A signal stopped the work at a step boundary; `message` says what was kept. Exit code 128 + signal."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number


_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # as CUDA, MPS and the CPU say it


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on any device. Told by its words, so that torch need not be imported."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
    )


def first_line(error: BaseException) -> str:
    """What an error says, short enough for a message of one line."""
    text = str(error).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def explain(error: OSError) -> str:
    """`No space left on device: PATH. Free some space.`: the reason first, since a list may cut the rest.

    Not every error has a path.
    """
    path = f": {error.filename}" if error.filename else ""
    return f"{error.strerror or error}{path}.{' Free some space.' if error.errno in FULL else ''}"
