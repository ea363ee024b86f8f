"""A text of any length: laid out for the width, searched, followed as it grows, copied."""

from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

from textual import work
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.events import Resize
from textual.reactive import reactive
from textual.scrollbar import ScrollTo

from tui.panes.lines import MOVE_KEYS, Lines

Draw = Callable[[int], Iterable[Content]]  # the lines of a text for so many cells


class Text(Lines):
    """Shows what `draw(width)` returns; lines that are wider are wrapped, unless it is `wide`.

    `follow`: the last lines stay in view while it grows, until one scrolls up.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        *MOVE_KEYS,
        Binding("n", "match(1)", "Next match", show=False),
        Binding("N", "match(-1)", "Match before", show=False),
    ]
    follows: reactive[bool] = reactive(False)

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
        self._slow = slowly
        if not again:
            self.found = -1
            self.follows = self._grows
            self.scroll_to(0, 0, animate=False)
        self._lay_out()

    @property
    def plain(self) -> str:
        """What is shown, without styles."""
        return "\n".join(line.plain for line in self._lines)

    @work(thread=True, exclusive=True, group="lay out")
    def _lay_out_slowly(self, draw: Draw, width: int) -> None:
        lines = list(draw(width))
        self.app.call_from_thread(self._take, draw, width, lines)

    def _take(self, draw: Draw, width: int, lines: Sequence[Content]) -> None:
        if draw is self._draw and width == self.width:
            self._set_lines(width, lines)

    def _lay_out(self) -> None:
        width = self.width
        if width and self._slow:
            self._lay_out_slowly(self._draw, width)
        elif width:
            self._set_lines(width, list(self._draw(width)))

    def _set_lines(self, width: int, lines: Sequence[Content]) -> None:
        self._drawn_width = width
        if not self._wide:
            lines = [part for line in lines for part in wrapped(line, width)]
        self._lines = lines
        self.set_size(max((line.cell_length for line in lines), default=0), len(lines))
        if self.follows:
            self.call_after_refresh(self._show_end)

    def on_resize(self, _: Resize) -> None:
        if self.width != self._drawn_width:
            self._lay_out()

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
        self.refresh()

    # Movement: lines that come and go scroll too, so only what the user does ends or begins to follow

    def _scroll(self, lines: int) -> None:
        if lines < 0:
            self.follows = False
        self.scroll_relative(y=lines, animate=False)

    def action_move(self, by: int) -> None:
        self._scroll(by)

    def action_page(self, by: int) -> None:
        self._scroll(by * self.page_height)

    def action_first(self) -> None:
        self.follows = False
        self.scroll_to(y=0, animate=False)

    def action_last(self) -> None:
        self.follows = self._grows
        self._show_end()

    def _show_end(self) -> None:
        self.scroll_end(animate=False, immediate=True, x_axis=False)

    def watch_follows(self, follows: bool) -> None:
        if follows and self.is_mounted:
            self._show_end()

    def on_mouse_scroll_up(self) -> None:
        self.follows = False

    def on_scroll_to(self, event: ScrollTo) -> None:
        """The scroll bar was dragged."""
        if event.y is not None and event.y < self.max_scroll_y:
            self.follows = False


def wrapped(line: Content, width: int) -> list[Content]:
    return [line] if line.cell_length <= width else line.wrap(width)


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
