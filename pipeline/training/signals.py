"""Ctrl-C and SIGTERM, held back to a step boundary so that a checkpoint is never half a step."""

import signal
import threading
from types import FrameType
from typing import Any


class HeldSignals:
    """While entered, the first SIGINT or SIGTERM only sets `received`; the second acts as it always does."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "HeldSignals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._hold)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _hold(self, number: int, _frame: FrameType | None) -> None:
        self.received = number
        signal.signal(number, self._previous[number])
