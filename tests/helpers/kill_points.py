"""Moments at which a process changes files: counted in one run, so that the next can be killed at
one of them.
"""

import builtins
import io
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from typing import Any

CHANGES = ("fsync", "link", "mkdir", "remove", "rename", "replace", "rmdir", "unlink")  # of `os`
WRITES = frozenset("wax+")  # in a mode of `open`


def count_changes(counter: str) -> None:
    """From now on each change of a file by this process adds a byte to the file `counter`, which
    exists.
    """
    handle = os.open(counter, os.O_WRONLY | os.O_APPEND)

    def counted(change: Callable[[], Any]) -> Any:
        os.write(handle, b".")
        return change()

    _at_each_change(counted)


def die_at_change(number: int, after: bool) -> None:
    """SIGKILL this process right before or `after` the change with this number, from 1.

    After a file was opened for writing it is empty: what was to be written is lost.
    """
    os.setpgid(0, 0)
    numbers = count(1)

    def dying(change: Callable[[], Any]) -> Any:
        if next(numbers) != number:
            return change()
        if after:
            with suppress(OSError):  # there is nothing to remove, or it exists already
                change()
        os.kill(os.getpid(), signal.SIGKILL)
        return None

    _at_each_change(dying)


def _at_each_change(call: Callable[[Callable[[], Any]], Any]) -> None:
    """`call` gets each change of a file to make, in Python code: libraries in C open and write
    files themselves.
    """

    def wrapped(real: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments, **named: call(lambda: real(*arguments, **named))

    opened = io.open

    def opening(file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        def change() -> Any:
            return opened(file, mode, *arguments, **named)

        return call(change) if WRITES & set(mode) and not isinstance(file, int) else change()

    for name in CHANGES:
        setattr(os, name, wrapped(getattr(os, name)))
    io.open = builtins.open = opening
