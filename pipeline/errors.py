"""The two ways a command ends early on purpose."""


class UserError(Exception):
    """Something the user can mend: the message says what, and what to do next. Exit code 1."""


class Interrupted(Exception):
    """A signal stopped the work at a step boundary; `message` says what was kept. Exit code 128 + signal."""

    def __init__(self, signal_number: int, message: str) -> None:
        super().__init__(message)
        self.signal_number = signal_number
