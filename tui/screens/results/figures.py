"""The figures: a list, the picture, and the numbers that it was drawn from."""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from rich.text import Text
from textual import on, work
from textual.binding import Binding, BindingType
from textual.containers import Container, Horizontal
from textual.message import Message
from textual.widget import Widget
from textual.widgets import Static

from pipeline.errors import UserError
from pipeline.views.reports import Picture
from tui.screens.results.pages import ListPane
from tui.widgets.pane import Pane
from tui.widgets.picture import KINDS, kind_of_terminal, load_library, read_picture, widget_for

NOTHING = "No figures yet. Press R to run the pipeline: its evaluation draws one."


class PicturePane(Pane):
    """A picture, and what it shows."""

    TITLE = "Figure"
    HELP = """\
The picture as well as the terminal can draw it: its pixels in kitty, Ghostty, WezTerm, iTerm2, foot, mlterm,
mintty, Contour and Windows Terminal; half blocks elsewhere, in tmux and in a browser. `+` enlarges it.

- `p` draws it in another way: half blocks, sixel, kitty's protocol. Where nothing appears, the terminal cannot; `p`
  again.
- `o` shows the numbers that it was drawn from. An SVG is for a browser; its PNG is shown here.
"""
    can_focus = True
    DEFAULT_CSS = """
    PicturePane > #caption { height: auto; }
    PicturePane > #picture { height: 1fr; align: center middle; }
    PicturePane > #picture > * { width: auto; height: auto; }
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.picture: Picture | None = None
        self.kind = kind_of_terminal()
        self._image: Any = None

    def contents(self) -> Iterable[Widget]:
        yield Static(id="caption", markup=False)
        yield Container(id="picture")

    def show(self, picture: Picture | None) -> None:
        """Read a picture in a thread, then show it."""
        self.picture = picture
        self._caption("" if picture else NOTHING)
        if picture:
            self.show_title(*([picture.about] if picture.about else []), title=picture.title)
            self._read(picture)

    def _caption(self, text: str) -> None:
        self.query_one("#caption", Static).update(Text(text))

    @work(thread=True, exclusive=True, group="picture")
    def _read(self, picture: Picture) -> None:
        try:
            if picture.path.suffix != ".png":
                raise UserError(f"{picture.path.name} is for a browser: no PNG lies beside it.")
            load_library()
            image, text = read_picture(picture.path), picture.shows
        except UserError as error:
            image, text = None, str(error)
        self.app.call_from_thread(self._show_image, picture, image, text)

    def _show_image(self, picture: Picture, image: Any, text: str) -> None:
        if picture is not self.picture:
            return
        self._image = image
        self._caption(text)
        self.call_later(self._draw)

    async def _draw(self) -> None:
        holder = self.query_one("#picture")
        with self.app.batch_update():
            await holder.remove_children()
            if self._image is not None:
                await holder.mount(widget_for(self._image, self.kind))

    async def draw_otherwise(self) -> None:
        """Draw it by the next of KINDS."""
        kinds = list(KINDS)
        self.kind = kinds[(kinds.index(self.kind) + 1) % len(kinds)]
        self.app.notify(f"Pictures as {KINDS[self.kind]}.", markup=False)
        await self._draw()


class FiguresView(Horizontal):
    """A list of figures at the left, the picture at the right."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("o", "numbers", "numbers", id="results.figure_numbers"),
        Binding("p", "pixels", "pixels", id="results.pixels"),
    ]

    class Numbers(Message):
        """The user wants the numbers of the picture."""

        def __init__(self, picture: Picture) -> None:
            super().__init__()
            self.picture = picture

    def __init__(self, id: str) -> None:  # as Textual names it
        super().__init__(id=id)
        self._pictures: dict[str, Picture] = {}

    def compose(self) -> Iterable[Widget]:
        yield ListPane(
            title="Figures",
            help=(
                "The pictures that the evaluation, the figures and the studies wrote. Enter moves "
                "to the picture."
            ),
        )
        yield PicturePane()

    def show(self, pictures: Sequence[Picture]) -> None:
        self._pictures = {picture.key: picture for picture in pictures}
        self.query_one(ListPane).show(pictures)
        if not pictures:
            self.query_one(PicturePane).show(None)

    def point(self, key: str) -> None:
        """Show the picture of this key, or of the stage with this output folder."""
        found = next(
            (each for each in self._pictures if each == key or each.startswith(f"{key}/")), ""
        )
        if found:
            self.query_one(ListPane).point(found)

    async def action_pixels(self) -> None:
        await self.query_one(PicturePane).draw_otherwise()

    def action_numbers(self) -> None:
        if picture := self.query_one(PicturePane).picture:
            self.post_message(self.Numbers(picture))

    @on(ListPane.Pointed)
    def _pointed(self, event: ListPane.Pointed) -> None:
        event.stop()
        pane, picture = self.query_one(PicturePane), self._pictures.get(event.key)
        if picture is not pane.picture:
            pane.show(picture)
        if event.entered:
            self.screen.set_focus(pane)
