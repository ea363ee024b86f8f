"""The figures that the stages wrote, each with its caption, as the terminal can draw it."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from textual import on, work
from textual.containers import Container, VerticalScroll
from textual.widget import Widget
from textual.widgets import Static

from pipeline.errors import UserError
from pipeline.views.reports import Picture, numbers_of
from tui.dialogs import Reader
from tui.panes.table import Table
from tui.screens.results.reading import Results
from tui.screens.results.view import View, listed
from tui.widgets.picture import KINDS, kind_of_terminal, load_library, read_picture, widget_for

NO_FIGURE = "No figures yet. Press R to run the pipeline: its evaluation draws one."
MAX_FILES = 8  # whose numbers are shown at a time


class FiguresView(View):
    def __init__(self) -> None:
        super().__init__(id="figures-view")
        self.table, self.caption = listed(), Static(id="caption", markup=False)
        self.holder = Container(id="picture")
        self.figure = VerticalScroll(self.caption, self.holder)
        self.kind = kind_of_terminal()
        self._image: Any = None

    def compose(self) -> Iterable[Widget]:
        yield self.pane("figures", self.table)
        yield self.pane("figure", self.figure)

    def show_results(self, results: Results) -> None:
        self.table.show(results.pictures)
        if not results.pictures:
            self.caption.update(NO_FIGURE)

    def point(self, key: str) -> None:
        """Also at the first picture of a stage, by its output folder."""
        keys = [picture.key for picture in self.results.pictures]
        self.table.point(next((each for each in keys if f"{each}/".startswith(f"{key}/")), None))

    @on(Table.Pointed)
    def pointed(self, event: Table.Pointed) -> None:
        self.titled("figure", event.row.about, title=event.row.title)
        self._read(event.row)

    @on(Table.Opened)
    def opened(self) -> None:
        self.screen.set_focus(self.figure)

    @work(thread=True, exclusive=True, group="picture")
    def _read(self, picture: Picture) -> None:
        image, text = None, picture.shows
        try:
            if picture.path.suffix != ".png":
                raise UserError(f"{picture.path.name} is for a browser: no PNG lies beside it.")
            load_library()
            image = read_picture(picture.path)
        except UserError as error:
            text = str(error)
        self.app.call_from_thread(self._take, picture, image, text)

    def _take(self, picture: Picture, image: Any, text: str) -> None:
        if picture is self.table.pointed:
            self._image = image
            self.caption.update(text)
            self.call_later(self._draw)

    async def _draw(self) -> None:
        with self.app.batch_update():
            await self.holder.remove_children()
            if self._image is not None:
                await self.holder.mount(widget_for(self._image, self.kind))

    async def draw_otherwise(self) -> str:
        """Draw it by the next of KINDS, which is returned."""
        kinds = list(KINDS)
        self.kind = kinds[(kinds.index(self.kind) + 1) % len(kinds)]
        await self._draw()
        return KINDS[self.kind]

    @work(thread=True, exclusive=True, group="numbers")
    def show_numbers(self, picture: Picture, root: Path) -> None:
        text = "\n".join(numbers_of(path, root) for path in picture.numbers[:MAX_FILES])
        self.app.call_from_thread(self.app.push_screen, Reader(text, picture.title))
