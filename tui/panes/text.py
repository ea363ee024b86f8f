"""A text of any length: laid out for the width, searched, followed as it grows, copied."""

from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

from textual import work
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.reactive import reactive
from textual.scrollbar import ScrollTo
from textual.widgets import Static

from tui.panes.lines import FromPane, Lines, wrapped

Draw = Callable[[int], Iterable[Content]]  # the lines of a text for so many cells


class Text(Lines):
    """Shows what `draw(width)` returns; lines that are wider are wrapped, unless it is `wide`.

    `follow`: the last lines stay in view while it grows, until one scrolls up.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("n", "match(1)", "Next match", show=False),
        Binding("N", "match(-1)", "Match before", show=False),
    ]
    follows: reactive[bool] = reactive(False)

    class Moved(FromPane):
        """Another match is shown, something else is searched, or it begins or ends to follow."""

    def __init__(
        self,
        text: Content | str = "",
        *,
        follow: bool = False,
        wide: bool = False,
        id: str | None = None,  # as Textual names it
    ) -> None:
        super().__init__(id=id)
        self._draw: Draw = lambda _: _split(text)
        self._lines: Sequence[Content] = ()
        self._wide, self._slow, self._drawn_width = wide, False, -1
        self._grows = follow
        self.set_reactive(Text.follows, follow)
        self.needle = ""
        self.found = -1  # the line of the match that is shown

    # What is shown

    def show(
        self, text: Content | str | Draw, *, again: bool = False, slowly: bool = False
    ) -> None:
        """Show a text from its beginning; `again`: the same, where one has scrolled to.

        `slowly`: a thread lays it out, as it takes long.
        """
        self._draw = text if callable(text) else lambda _: _split(text)
        self._slow, self._drawn_width = slowly, -1
        if not again:
            self.found = -1
            self.follows = self._grows
            self.scroll_to(0, 0, animate=False)
        self.lay_out()

    def lay_out(self) -> None:
        width = self.width
        if width in (0, self._drawn_width):
            return
        self._drawn_width = width
        if self._slow:
            self._lay_out_slowly(self._draw, width)
        else:
            self._set_lines(self._drawn(self._draw, width))

    @work(thread=True, exclusive=True, group="lay out")
    def _lay_out_slowly(self, draw: Draw, width: int) -> None:
        lines = self._drawn(draw, width)
        self.app.call_from_thread(self._take, draw, width, lines)

    def _take(self, draw: Draw, width: int, lines: Sequence[Content]) -> None:
        if draw is self._draw and width == self._drawn_width:
            self._set_lines(lines)

    def _drawn(self, draw: Draw, width: int) -> Sequence[Content]:
        if self._wide:
            return list(draw(width))
        return [part for line in draw(width) for part in wrapped(line, width)]

    def _set_lines(self, lines: Sequence[Content]) -> None:
        self._lines = lines
        # What is wrapped has no width of its own, so that other numbers in it lay nothing out again.
        widths = (line.cell_length for line in lines if self._wide)
        self.set_size(max(widths, default=0), len(lines))
        if self.follows:
            self.watch_follows()

    def line(self, number: int) -> Content:
        line = self._lines[number]
        if not self.needle:
            return line
        style = "$text-warning on $warning-muted"
        if number == self.found:
            style = "bold $background on $warning"
        for start in _places(line.plain, self.needle):
            line = line.stylize(style, start, start + len(self.needle))
        return line

    # Search

    @property
    def matches(self) -> list[int]:
        """The lines that contain what is searched."""
        if not self.needle:
            return []
        return [n for n, line in enumerate(self._lines) if self.needle in line.plain.casefold()]

    def filter(self, text: str) -> None:
        """Mark what contains `text`, and go to the first from here on; of a text that grows to the
        last.
        """
        self.needle = text.casefold()
        matches, here = self.matches, round(self.scroll_offset.y)
        self.found = next((n for n in matches if n >= here), matches[0] if matches else -1)
        if self.follows and matches:
            self.found = matches[-1]
        self._show_found()

    def action_match(self, by: int) -> None:
        """Go to the next match, or with -1 to the one before; after the last comes the first."""
        matches = self.matches if by > 0 else self.matches[::-1]
        if matches:
            further = (n for n in matches if (n - self.found) * by > 0)
            self.found = next(further, matches[0])
            self._show_found()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Without a search, `n` goes on to the screen."""
        if action == "match":
            return bool(self.needle)
        return super().check_action(action, parameters)

    def _show_found(self) -> None:
        if self.found >= 0:
            self.follows = False
            self.scroll_to(y=max(self.found - self.page_height // 2, 0), animate=False, force=True)
        self.redraw()
        self.post_message(self.Moved(self))

    # Movement: lines that come and go scroll too, so only what the user does ends or begins to follow

    def action_move(self, by: int) -> None:
        if by < 0:
            self.follows = False
        self.scroll_relative(y=by, animate=False)

    def action_last(self) -> None:
        self.follows = self._grows
        self._show_end()

    def _show_end(self) -> None:
        self.scroll_end(animate=False, immediate=True, x_axis=False)

    def watch_follows(self) -> None:
        if self.follows:  # still
            self._show_end()
        self.post_message(self.Moved(self))

    def on_mouse_scroll_up(self) -> None:
        self.follows = False

    on_scroll_up = on_mouse_scroll_up  # a click above the handle of the scroll bar

    def on_scroll_to(self, event: ScrollTo) -> None:
        """The scroll bar was dragged."""
        if event.y is not None and event.y < self.max_scroll_y:
            self.follows = False


def say(static: Static, text: Content | str) -> None:
    """Show a text in a Static; only another one than it has, as it lays out the screen."""
    if str(static.content) != str(text):
        static.update(text)


def _split(text: Content | str) -> list[Content]:
    content = text if isinstance(text, Content) else Content(text)
    return content.split(allow_blank=True) if content else []


def _places(text: str, needle: str) -> Iterable[int]:
    """Where `needle` begins in a text; nowhere if folding the case changes the text's length, as of
    ß.
    """
    folded, start = text.casefold(), 0
    while len(folded) == len(text) and (start := folded.find(needle, start)) >= 0:
        yield start
        start += len(needle)
