"""The two exceptions that end a command early on purpose, and messages for a lack of memory or disk space."""

import errno

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})  # lack of space, as opposed to faulty input


LONGEST_MESSAGE = 2_000  # characters of a line
# Characters that a terminal executes instead of showing: C0 and C1 control characters, DEL and bidirectional controls;
# and those that end a line. C0 characters have a Unicode control picture.
CONTROL = {code: chr(0x2400 + code) for code in range(32)} | {0x7F: "␡"}
CONTROL |= dict.fromkeys((*range(0x80, 0xA0), 0x2028, 0x2029, *range(0x202A, 0x202F), *range(0x2066, 0x206A)), "\ufffd")


class UserError(Exception):
    """An error that the user can fix: the message says what is wrong and what to do next. Exit code 1.

    Each argument is a line. Messages quote names and values of files from elsewhere, which may have control characters,
    line breaks that would fake a second message, or megabytes: signs replace the former, an ellipsis the middle of a
    long line.
    """

    def __init__(self, *lines: str) -> None:
        super().__init__(*map(_one_line, lines))

    def __str__(self) -> str:
        return "\n".join(self.args)


def _one_line(text: str) -> str:
    if len(text) > LONGEST_MESSAGE:
        text = f"{text[: LONGEST_MESSAGE - 501]}…{text[-500:]}"  # the next step is at the end
    return text if text.isprintable() else text.translate(CONTROL)


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
