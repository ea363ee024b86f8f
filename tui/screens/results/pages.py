"""What the stages wrote: their reports, each as a page, and their figures, each with its caption, as
the terminal can draw it.
"""

import asyncio
from collections.abc import Iterable
from typing import Any

from textual import on, work
from textual.containers import Container, VerticalScroll
from textual.content import Content
from textual.widget import Widget
from textual.widgets import Static

from pipeline.errors import UserError
from pipeline.views.reports import Page, Picture
from tui.dialogs import read_page
from tui.panes.markdown import markdown
from tui.panes.pane import Pane
from tui.panes.table import Column, Table
from tui.panes.text import Text
from tui.screens.results.view import View
from tui.widgets.picture import KINDS, kind_of_terminal, read_picture, widget_for


def listed() -> Table[Any]:
    """A table of pages or pictures; those that were not made yet are dim."""
    title = Column[Any]("title", _title, fills=True)
    return Table(key=lambda entry: entry.key, columns=[title], titles=False)


def _title(entry: Page | Picture) -> Content:
    return Content.styled(entry.title, "" if entry.path else "$foreground-muted")


class ReportsView(View):
    def __init__(self) -> None:
        super().__init__(id="report-view")
        self.table, self.page = listed(), Text(wide=True)

    def compose(self) -> Iterable[Widget]:
        yield self.pane("reports", self.table)
        yield self.pane("report", self.page)

    @on(Table.Pointed)
    def pointed(self, event: Table.Pointed) -> None:
        page, variables = event.row, self.app.theme_variables
        again = self.query_one("#report", Pane).title == page.title
        self.page.show(
            lambda width: markdown(_text(page), variables)(width), again=again, slowly=True
        )
        self.titled("report", page.about, title=page.title)


def _text(page: Page) -> str:
    if page.path is None:
        return f"{page.title} was not measured yet. Press R to run what is left."
    return read_page(page.path)


class FiguresView(View):
    def __init__(self) -> None:
        super().__init__(id="figures-view")
        self.table, self.caption = listed(), Static(id="caption", markup=False)
        self.holder = Container(id="picture")
        self.kind = kind_of_terminal()

    def compose(self) -> Iterable[Widget]:
        yield self.pane("figures", self.table)
        yield self.pane("figure", VerticalScroll(self.caption, self.holder))

    def point(self, folder: str) -> None:
        """Move the cursor to the first picture of a stage, by its output folder."""
        keys = (picture.key for picture in self.table.rows)
        self.table.point(next((key for key in keys if key.startswith(f"{folder}/")), None))

    @on(Table.Pointed)
    def pointed(self, event: Table.Pointed) -> None:
        self.titled("figure", event.row.about, title=event.row.title)
        self._show(event.row)

    @work(exclusive=True)
    async def _show(self, picture: Picture) -> None:
        image, caption = await asyncio.to_thread(_read, picture)
        self.caption.update(caption)
        with self.app.batch_update():
            await self.holder.remove_children()
            if image is not None:
                await self.holder.mount(widget_for(image, self.kind))

    def draw_otherwise(self) -> str:
        """Draw it by the next of KINDS, which is returned."""
        kinds = list(KINDS)
        self.kind = kinds[(kinds.index(self.kind) + 1) % len(kinds)]
        if picture := self.table.pointed:
            self._show(picture)
        return KINDS[self.kind]


def _read(picture: Picture) -> tuple[Any, str]:
    """The image and its caption, or why there is none."""
    try:
        return read_picture(picture.path), picture.shows
    except UserError as error:
        return None, str(error)
