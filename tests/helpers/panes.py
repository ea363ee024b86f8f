"""Panes of `tui/panes` in an app of their own."""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from textual.app import App
from textual.geometry import Size
from textual.message import Message
from textual.pilot import Pilot
from textual.widget import Widget

from tests.helpers.pilot import screen_text, until
from tui.panes.table import Column, Table
from tui.themes import DARK

M = TypeVar("M", bound=Message)
# names that somebody may have given to a file to be looked at
HOSTILE = (
    "[red]not red[/red] [@click=app.bell]x[/]",
    "\x1b[31mred\x1b[0m \x9b31m \x07",
    "世界 名前 ｗｉｄｅ",
    "e\u0301a\u0308\u200d combined",
    "\u202eright to left\u202c שלום مرحبا",
    "two\nlines\tand a tab\r\n",
    "👩\u200d💻 🤗 \ufe0f",
    "x" * 10_000,
    "",
    " ",
)
SIZES = ((30, 8), (200, 60), (1, 1), (30, 8))  # a terminal that is resized


class PanesApp(App[None]):
    """Widgets below each other."""

    def __init__(self, widgets: Iterable[Widget]) -> None:
        super().__init__()
        self.widgets = widgets

    def compose(self) -> Iterable[Widget]:
        yield from self.widgets

    def on_mount(self) -> None:
        self.register_theme(DARK)
        self.theme = DARK.name


class Panes:
    """What a test sees and does."""

    def __init__(self, pilot: Pilot[None], posted: list[Message]) -> None:
        self.pilot, self.posted = pilot, posted

    def messages(self, kind: type[M]) -> list[M]:
        """Those of just this kind since the last call."""
        found = [message for message in self.posted if type(message) is kind]
        self.posted[:] = [message for message in self.posted if type(message) is not kind]
        return found

    async def press(self, *keys: str) -> None:
        await self.pilot.press(*keys)
        await self.pilot.pause()

    async def resize(self, width: int, height: int) -> None:
        await self.pilot.resize_terminal(width, height)
        size = Size(width, height)
        await until(self.pilot, lambda: self.pilot.app.screen._compositor.size == size)

    async def click(self, widget: Widget, x: int, y: int) -> None:
        await self.pilot.click(widget, offset=(x, y))
        await self.pilot.pause()

    async def settle(self) -> None:
        """Wait for what was shown to be drawn."""
        await self.pilot.pause()
        await self.pilot.pause()

    @property
    def lines(self) -> list[str]:
        """The rows of the terminal."""
        return screen_text(self.pilot.app).splitlines()


@asynccontextmanager
async def mounted(*widgets: Widget, size: tuple[int, int] = (60, 12)) -> AsyncIterator[Panes]:
    """An app with these widgets, the first of which has the focus."""
    posted: list[Message] = []

    def hear(message: Message) -> None:
        """A message was posted; it comes again at each widget above."""
        if all(message is not before for before in posted):
            posted.append(message)

    async with PanesApp(widgets).run_test(size=size, message_hook=hear) as pilot:
        if widgets[0].can_focus:
            widgets[0].focus()
        await pilot.pause()
        yield Panes(pilot, posted)


def numbers_table(count: int, **options: Any) -> Table[int]:
    """A table of the numbers from 0, with their squares."""
    columns = [
        Column[int]("number", str, lambda row: row, right=True),
        Column[int]("square", lambda row: str(row * row), lambda row: row * row, right=True),
    ]
    table = Table[int](key=lambda row: row, columns=columns, **options)
    table.show(range(count))
    return table
