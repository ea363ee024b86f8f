"""What is typed, key by key: each is handled with all that it causes before the next one is looked at.

Textual gives a key to the widget that has the focus at once. A key of a binding (Ctrl+U, Tab, Enter) then climbs
through the message queues of all parents up to the app, and only there its action runs, while the letters typed after
it are already in the field: `abc`, Ctrl+U, `def` in one burst empties the line, and what follows a Tab lands in the
field before.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

from textual.app import App
from textual.events import Event
from textual.message_pump import MessagePump

# The key climbs to the app, where its action runs; what the action says (Submitted) climbs to the screen; so does what
# a widget on the way says then (Saved), or the first focus of a dialog that was opened.
CLIMBS = 3
PATIENCE = 5.0  # seconds for one widget: one that hangs must not take the keyboard with it


class Typed:
    """Keys and pastes in the order in which they came. `deliver` handles one, in the app's own message loop."""

    def __init__(self, app: App[Any], deliver: Callable[[Event], Awaitable[None]]) -> None:
        self._app, self._deliver = app, deliver
        self._waiting: deque[Event] = deque()
        self._busy = False

    def add(self, event: Event) -> None:
        self._waiting.append(event)
        if not self._busy:
            self._busy = True
            self._app.run_worker(self._hand_out(), group="typed")

    async def _hand_out(self) -> None:
        try:
            while self._waiting:
                self._app.call_later(self._deliver, self._waiting.popleft())
                for _ in range(CLIMBS):
                    await self._climb()
        finally:
            self._busy = False

    async def _climb(self) -> None:
        """Wait for all messages that are now between the focus and the app."""
        for node in (self._app.focused or self._app.screen).ancestors_with_self:
            await _caught_up(node)


async def _caught_up(node: MessagePump) -> None:
    """Wait until a widget has handled all messages that it has now."""
    done = asyncio.Event()
    if node.call_later(done.set):  # a widget that is being removed takes no more
        with suppress(TimeoutError):
            await asyncio.wait_for(done.wait(), PATIENCE)
