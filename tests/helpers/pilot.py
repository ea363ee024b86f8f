"""What tests of the screens share."""

import asyncio
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from textual.app import App
from textual.pilot import Pilot
from textual.screen import Screen

from tui.app import Workbench

S = TypeVar("S", bound=Screen[Any])

SOON = 0.02  # seconds: a picture is drawn at most 1/60 s after it was asked for


async def idle(*_: float, most: float = 10.0) -> None:
    """Wait until the app has nothing to do: no callback is left, no thread works for it, no timer
    is due soon.
    """
    loop: Any = asyncio.get_running_loop()
    end = loop.time() + most
    while loop.time() < end:
        await asyncio.sleep(0)
        if loop._ready:
            continue
        if _works_in_threads(loop):
            await asyncio.sleep(0.001)
            continue
        due = [timer.when() for timer in loop._scheduled if not timer.cancelled()]
        first = min(due, default=end) - loop.time()
        if first > SOON:
            return
        await asyncio.sleep(first)


def _works_in_threads(loop: Any) -> bool:
    """Whether `asyncio.to_thread` or a worker in a thread has something to do."""
    pool = loop._default_executor
    return pool is not None and (
        pool._work_queue.qsize() > 0 or pool._idle_semaphore._value < len(pool._threads)
    )


async def until(pilot: Pilot[Any], holds: Callable[[], object], seconds: float = 30) -> None:
    """Wait until something holds, as a user would who looks at the screen."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come to hold in time"
        await asyncio.sleep(0.005)
    await pilot.pause()


async def drawn(pilot: Pilot[Any]) -> None:
    """Wait until a conversation shows what changed: it does so in a worker."""
    await until(pilot, lambda: not any(w.group == "show" for w in pilot.app.workers))


async def screen_opens(pilot: Pilot[Any], kind: type[S], seconds: float = 30) -> S:
    """Wait until a screen of this kind is on top; returns it."""
    await until(pilot, lambda: isinstance(pilot.app.screen, kind), seconds)
    screen = pilot.app.screen
    assert isinstance(screen, kind)
    return screen


def screen_text(app: App[Any]) -> str:
    """All text on the screen, a line each."""
    return "\n".join(
        "".join(segment.text for segment in strip)
        for strip in app.screen._compositor.render_strips()
    )


class AppSession(Generic[S]):
    """The app on one of its screens."""

    kind: type[S]

    def __init__(self, pilot: Pilot[None]) -> None:
        self.pilot = pilot

    @property
    def app(self) -> Workbench:
        assert isinstance(self.pilot.app, Workbench)
        return self.pilot.app

    @property
    def screen(self) -> S:
        return next(screen for screen in self.app.screen_stack if isinstance(screen, self.kind))

    def messages(self) -> str:
        return "\n".join(text for _, _, text in self.app.message_history)

    async def press(self, *keys: str) -> None:
        await self.pilot.press(*keys)
        await self.pilot.pause()
