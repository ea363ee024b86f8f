"""A queue of keys: each is handled, with every message that it causes, before the next is delivered.

Textual gives a key to the focused widget immediately. A key with a binding (Ctrl+U, Tab, Enter) then bubbles through
the message queues of all parents to the app, where its action runs. By then the letters typed after it are already in
the field: `abc`, Ctrl+U, `def` in one burst empties the line, and what follows a Tab lands in the previous field.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from textual.app import App
from textual.events import Event

# The key bubbles to the app, where its action runs; the action's message (Submitted) bubbles to the screen; so does a
# message posted in reply (Saved), or the first focus of a dialog that was opened.
ROUNDS = 3
PATIENCE = 5.0  # seconds per widget: one that hangs must not block the keyboard


class KeyQueue:
    """Keys and pastes in the order of arrival. `deliver` handles one, in the app's message loop."""

    def __init__(self, app: App[Any], deliver: Callable[[Event], Awaitable[None]]) -> None:
        self._app, self._deliver = app, deliver
        self._events: deque[Event] = deque()
        self._busy = False

    def add(self, event: Event) -> None:
        self._events.append(event)
        if not self._busy:
            self._busy = True
            self._app.run_worker(self._deliver_all(), group="typed")

    async def _deliver_all(self) -> None:
        try:
            while self._events:
                self._app.call_later(self._deliver, self._events.popleft())
                for _ in range(ROUNDS):
                    # Wait for all messages queued now between the focused widget and the app.
                    for node in (self._app.focused or self._app.screen).ancestors_with_self:
                        done = asyncio.Event()
                        if node.call_later(done.set):  # False for a widget that is being removed
                            with suppress(TimeoutError):
                                await asyncio.wait_for(done.wait(), PATIENCE)
        finally:
            self._busy = False
