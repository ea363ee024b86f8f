"""The pane of a log: wrapped lines, of which only those that are seen are drawn; search, follow,
copy.
"""

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

from rich.cells import cell_len, chop_cells
from rich.segment import Segment
from rich.style import Style
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.message import Message
from textual.reactive import reactive
from textual.scroll_view import ScrollView
from textual.scrollbar import ScrollTo
from textual.strip import Strip
from textual.widget import Widget

from tui.widgets.pane import Pane

ERRORS = ("error", "traceback", "✗")  # what a line of a failure begins with


def wrap_line(line: str, width: int) -> list[str]:
    """The parts of a line that is wider than `width` cells: broken between words, in a word only if
    it is longer.
    """
    parts = textwrap.wrap(line, width, drop_whitespace=False, break_on_hyphens=False)
    return [
        piece
        for part in parts
        for piece in ([part] if cell_len(part) <= width else chop_cells(part, width))
    ]


class LogView(ScrollView, can_focus=True):
    """Lines of text. While it follows, the last ones are seen; to scroll up ends that, End begins
    it again.
    """

    DEFAULT_CSS = """
    LogView { height: 1fr; background: transparent; scrollbar-gutter: stable; overflow-x: hidden; }
    LogView > .log--error { color: $text-error; }
    LogView > .log--muted { color: $text-muted; }
    LogView > .log--match { background: $warning-muted; color: $text-warning; }
    LogView > .log--found { background: $warning; color: $background; text-style: bold; }
    """
    COMPONENT_CLASSES: ClassVar[set[str]] = {"log--error", "log--muted", "log--match", "log--found"}
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("j", "scroll_down", "Down", show=False),
        Binding("k", "scroll_up", "Up", show=False),
        Binding("home,g", "scroll_home", "First", show=False),
        Binding("end,G", "scroll_end", "Last", show=False),
    ]
    follows: reactive[bool] = reactive(True)

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []
        self.text = ""  # that is searched
        self.found = -1  # the line of the match that the cursor is on
        self._rows: list[tuple[int, str]] = []  # line and the part of it that a row holds
        self._width = 0

    def show(self, lines: Sequence[str], reset: bool = False) -> None:
        """Show these lines. `reset`: they are another log's."""
        if list(lines) == self.lines and not reset:
            return
        self.lines = [*lines]
        if reset:
            self.follows, self.found = True, -1
        self._wrap()

    def on_resize(self) -> None:
        if self._width != self.scrollable_content_region.width:
            self._wrap()

    def _wrap(self) -> None:
        self._width = width = self.scrollable_content_region.width
        if not width:  # hidden
            return
        self._rows = [
            (number, part)
            for number, line in enumerate(self.lines)
            for part in ([line] if cell_len(line) <= width else wrap_line(line, width))
        ]
        self.virtual_size = Size(width, len(self._rows))
        self.refresh()
        self.call_after_refresh(self._show_end)

    def _show_end(self) -> None:
        if self.follows:
            self.scroll_end(animate=False, immediate=True, x_axis=False)

    def render_line(self, y: int) -> Strip:
        row = y + self.scroll_offset.y
        width, base = self._width, self.rich_style
        if row >= len(self._rows):
            return Strip.blank(width, base)
        number, part = self._rows[row]
        line = self.lines[number].lstrip().casefold()
        style = base
        if line.startswith(ERRORS):
            style += self._part("log--error")
        elif line.startswith((">", "…")):
            style += self._part("log--muted")
        segments, end = list[Segment](), 0
        folded = part.casefold()
        # where folding changes the length of a text, as of ß, a match is not marked
        while (
            self.text and len(folded) == len(part) and (start := folded.find(self.text, end)) >= 0
        ):
            match = self._part("log--found" if number == self.found else "log--match")
            segments += [
                Segment(part[end:start], style),
                Segment(part[start : start + len(self.text)], style + match),
            ]
            end = start + len(self.text)
        return Strip([*segments, Segment(part[end:], style)]).adjust_cell_length(width, base)

    def _part(self, name: str) -> Style:
        return self.get_component_rich_style(name, partial=True)

    # Follow and search

    # Lines that come and go scroll too, so only what the user does ends or begins to follow.

    def action_scroll_up(self) -> None:
        self.follows = False
        super().action_scroll_up()

    def action_page_up(self) -> None:
        self.follows = False
        super().action_page_up()

    def action_scroll_home(self) -> None:
        self.follows = False
        super().action_scroll_home()

    def action_scroll_end(self) -> None:
        self.follows = True

    def on_mouse_scroll_up(self) -> None:
        self.follows = False

    def on_scroll_to(self, event: ScrollTo) -> None:
        """The scroll bar was dragged."""
        self.follows = event.y is not None and event.y >= self.max_scroll_y

    def watch_follows(self) -> None:
        if self.is_mounted:
            self._show_end()

    def matches(self) -> list[int]:
        """The lines that contain what is searched."""
        return (
            [n for n, line in enumerate(self.lines) if self.text in line.casefold()]
            if self.text
            else []
        )

    def search(self, text: str) -> None:
        """Mark what contains `text`, and go to the last: what is searched in a log is mostly the
        newest.
        """
        self.text = text.casefold()
        self.found = next(reversed(self.matches()), -1)
        self._show_found()

    def step_match(self, by: int) -> None:
        """Go to the next match, or with -1 to the one before; after the last comes the first."""
        lines = self.matches()
        if not lines:
            return
        after = [line for line in lines if (line > self.found if by > 0 else line < self.found)]
        self.found = (after or lines)[0 if by > 0 else -1]
        self._show_found()

    def _show_found(self) -> None:
        row = next(
            (number for number, (line, _) in enumerate(self._rows) if line == self.found), None
        )
        if row is not None:
            self.follows = False
            self.scroll_to(y=max(row - self.size.height // 2, 0), animate=False, immediate=True)
        self.refresh()


class LogPane(Pane):
    """Shows the log of a stage, or of all that the pipeline printed."""

    TITLE = "Log"
    FILTER = True
    HELP = """\
What the stage printed when the pipeline ran it last, and the steps that it logged. The newest
lines are followed until you scroll up; **End** or **f** follows again. **/** searches: **n** goes
to the next match, **N** to the one before. **a** shows the whole log of the pipeline, with what
dvc says. **y** copies the lines, **+** gives the log the whole screen. A stage that was started in
a terminal prints there; of it only the steps are here."""
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("a", "all", "all stages", id="pipeline.whole_log"),
        Binding("f", "follow", "follow", id="pipeline.follow"),
        Binding("n", "match(1)", "next match", id="pipeline.next_match", show=False),
        Binding("N", "match(-1)", "match before", id="pipeline.match_before", show=False),
        Binding("y", "copy", "copy", id="pipeline.copy_log"),
    ]

    class Changed(Message):
        """Another log is wanted: the stage's, or the whole one."""

    def __init__(self) -> None:
        super().__init__(id="log")
        self.is_whole = False
        self._shown: Any = None  # of what the lines are

    def contents(self) -> Iterable[Widget]:
        yield LogView()

    @property
    def view(self) -> LogView:
        return self.query_one(LogView)

    def on_mount(self) -> None:
        super().on_mount()
        self.watch(self.view, "follows", lambda: self._show_facts(), init=False)

    def show(self, name: str, lines: Sequence[str]) -> None:
        """Show the lines of a log by its name."""
        self.view.show(lines, reset=name != self._shown)
        if name != self._shown:
            self._shown = name
            self.show_title(title=f"Log of {name}")
            if self.filter_text:
                self.filtered(self.filter_text)
        self._show_facts()

    def _show_facts(self) -> None:
        view = self.view
        matches = view.matches() if view.text else []
        place = f"{matches.index(view.found) + 1 if view.found in matches else 0} of {len(matches)}"
        self.show_title(*[place] * bool(view.text), *["following"] * view.follows)

    def shown_keys(self) -> list[tuple[str, str, str]]:
        matches = [("match", "n N", "matches")] if self.filter_text else []
        keys = super().shown_keys()
        return [
            *matches,
            *((action, key, "search" if key == "/" else label) for action, key, label in keys),
        ]

    def filtered(self, text: str) -> None:
        self.view.search(text)
        self._show_facts()

    def action_match(self, by: int) -> None:
        self.view.step_match(by)
        self._show_facts()

    def action_follow(self) -> None:
        self.view.follows = not self.view.follows

    def action_all(self) -> None:
        self.is_whole = not self.is_whole
        self.post_message(self.Changed())

    def action_copy(self) -> None:
        self.app.copy_to_clipboard("\n".join(self.view.lines))
        self.notify(f"{len(self.view.lines):,} lines copied.")
