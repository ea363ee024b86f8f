"""The rows of a file as a list of any length: only what is visible is asked for and drawn."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from rich.cells import cell_len, set_cell_size
from rich.segment import Segment
from rich.style import Style
from textual.binding import Binding, BindingType
from textual.events import Click
from textual.geometry import Region, Size
from textual.message import Message
from textual.reactive import reactive
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.widget import Widget

from pipeline.views.data_files import flat
from tui.widgets.pane import Pane
from tui.widgets.table import MOVE_KEYS

PAGE = 100  # rows that are asked for at once
MAX_KEPT = 5000  # rows; the farthest are forgotten


@dataclass
class RowLine:
    """A row in the list. `number`: as it is named in messages. `tokens`, `cut`: None until they are
    counted.
    """

    number: int
    text: str
    problem: str = ""
    tokens: int | None = None
    cut: int = 0


class RowList(ScrollView, can_focus=True):
    """Lines of rows by their position in the file; after a search, of those that were found."""

    DEFAULT_CSS = """
    RowList { height: 1fr; background: transparent; scrollbar-size-vertical: 1; overflow-x: hidden; }
    RowList > .rows--cursor { background: $block-cursor-blurred-background; text-style: bold; }
    RowList:focus > .rows--cursor { background: $block-cursor-background; color: $block-cursor-foreground; }
    RowList > .rows--problem { color: $text-error; }
    RowList > .rows--cut { color: $text-warning; }
    """
    COMPONENT_CLASSES: ClassVar[set[str]] = {"rows--cursor", "rows--problem", "rows--cut"}
    BINDINGS: ClassVar[list[BindingType]] = [*MOVE_KEYS]
    cursor = reactive(0, repaint=False)

    class Moved(Message):
        """The cursor is on another row."""

    class Wanted(Message):
        """Rows from position `first` on are visible and not here."""

        def __init__(self, first: int) -> None:
            super().__init__()
            self.first = first

    def __init__(self) -> None:
        super().__init__()
        self._lines: dict[int, RowLine] = {}
        self._found: list[int] | None = None  # positions of the rows that were found
        self.total = 0
        self._asked = -1
        # number of each row that a check complains about → error or warning
        self.problems: dict[int, str] = {}

    @property
    def count(self) -> int:
        return self.total if self._found is None else len(self._found)

    @property
    def position(self) -> int | None:
        """Of the row under the cursor, in the file."""
        if not 0 <= self.cursor < self.count:
            return None
        return self.cursor if self._found is None else self._found[self.cursor]

    @property
    def line(self) -> RowLine | None:
        position = self.position
        return None if position is None else self._lines.get(position)

    def reset(self) -> None:
        """Another file, or the same again."""
        self._lines, self._found, self.total, self._asked, self.problems = {}, None, 0, -1, {}
        self.cursor = 0
        self.scroll_to(y=0, animate=False)
        self._resized()

    def set_total(self, total: int) -> None:
        """There are at least so many rows."""
        if total != self.total:
            self.total = total
            self._resized()

    def show_found(self, positions: Sequence[int] | None) -> None:
        """Show these rows alone; all again with None, the cursor on the same row."""
        position = self.position
        self._found = None if positions is None else [*positions]
        self.cursor = position if positions is None and position is not None else 0
        self._resized()
        self.post_message(self.Moved())

    def add_found(self, position: int) -> None:
        if self._found is not None:
            self._found.append(position)
            self._resized()
            if len(self._found) == 1:
                self.post_message(self.Moved())

    def put(self, rows: Iterable[dict[str, Any]]) -> None:
        """Rows that were read."""
        for row in rows:
            line = RowLine(int(row["row"]), flat(str(row["text"])), str(row["problem"]))
            self._lines[int(row["position"])] = line
        if len(self._lines) > MAX_KEPT and self._found is None:
            near = sorted(self._lines, key=lambda position: abs(position - self.cursor))[
                : MAX_KEPT // 2
            ]
            self._lines = {position: self._lines[position] for position in near}
        self._asked = -1
        self.refresh()

    def put_lengths(self, lengths: dict[str, Sequence[int]], problems: dict[str, str]) -> None:
        """The tokens of rows, or why they have none."""
        for position, (tokens, _, cut) in lengths.items():
            if line := self._lines.get(int(position)):
                line.tokens, line.cut = tokens, cut
        for position, problem in problems.items():
            if line := self._lines.get(int(position)):
                line.problem = problem
        self.refresh()

    def known_problems(self) -> set[int]:
        """The numbers of all rows with a problem, as far as they are known."""
        return {*self.problems} | {line.number for line in self._lines.values() if line.problem}

    # Movement

    def action_move(self, rows: int) -> None:
        self.cursor = max(0, min(self.count - 1, self.cursor + rows))

    def action_page(self, pages: int) -> None:
        self.action_move(pages * max(1, self.size.height - 1))

    def on_click(self, event: Click) -> None:
        self.cursor = max(0, min(self.count - 1, event.y + self.scroll_offset.y))

    def watch_cursor(self, before: int, after: int) -> None:
        for index in (before, after):
            self.refresh_line(index - self.scroll_offset.y)
        self.scroll_to_region(Region(0, after, 1, 1), animate=False, force=True)
        self.post_message(self.Moved())

    def refresh_line(self, y: int) -> None:
        if 0 <= y < self.size.height:
            self.refresh(Region(0, y, self.size.width, 1))

    # Drawing

    def on_resize(self) -> None:
        self._resized()
        self.scroll_to_region(Region(0, self.cursor, 1, 1), animate=False, force=True)

    def _resized(self) -> None:
        self.virtual_size = Size(0, self.count)
        self.refresh()

    def render_line(self, y: int) -> Strip:
        index, width = y + self.scroll_offset.y, self.scrollable_content_region.width
        base = self.rich_style
        if not 0 <= index < self.count:
            return Strip.blank(width, base)
        position = index if self._found is None else self._found[index]
        line = self._lines.get(position)
        if line is None:
            self._want(position)
        cursor = (
            self.get_component_rich_style("rows--cursor", partial=True)
            if index == self.cursor
            else Style()
        )
        segments = [
            Segment(text, base + self._style(name) + cursor)
            for text, name in self._cells(line, width)
        ]
        return Strip(segments, width).adjust_cell_length(width, base + cursor)

    def _cells(self, line: RowLine | None, width: int) -> list[tuple[str, str]]:
        digits = max(3, len(str(self.total)))
        if line is None:
            return [("…".rjust(digits), "dim")]
        level = "error" if line.problem else self.problems.get(line.number, "")
        tokens = "" if line.tokens is None else f"{line.tokens:,}"
        right = f" {tokens:>5} " if width > 24 else " "
        sign = "!" if level else " "
        if level == "error":
            sign = "✗"
        elif line.cut:
            sign = "⊣"
        room = max(0, width - digits - 1 - len(right) - 1)
        text = line.text if line.text.strip() or not line.problem else line.problem
        shown = (
            set_cell_size(text, room)
            if cell_len(text) <= room
            else f"{set_cell_size(text, max(0, room - 1))}…"
        )
        style = "rows--problem" if level == "error" else "rows--cut"
        return [
            (f"{line.number:>{digits}} ", "dim"),
            (shown, "rows--problem" if line.problem else ""),
            (right, "rows--cut" if line.cut else "dim"),
            (sign, style),
        ]

    def _style(self, name: str) -> Style:
        if name == "dim":
            return Style(dim=True)
        return self.get_component_rich_style(name, partial=True) if name else Style()

    def _want(self, position: int) -> None:
        """Ask for the page that a visible row is on, once."""
        first = max(0, self.scroll_offset.y - PAGE // 4) if self._found is None else position
        if self._asked != first:
            self._asked = first
            self.post_message(self.Wanted(first))


class RowsPane(Pane):
    """The list, and a field that searches the file."""

    TITLE = "Rows"
    FILTER = True
    HELP = """\
Every row of the file: its line or row number, how it begins, and its tokens with the end token.

- **✗** cannot be read or encoded, **!** the check complains about it, **⊣** cut at `max_length`.
- `/` searches the whole file, whatever the case; `#120` goes to row 120.
- `e` edits the row into a copy of the file, which stays as it is. `x` writes all rows in another
  format.
- `m` checks all rows, which small files are at once. `n`, `N` go from problem to problem."""
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("e", "screen.edit", "edit", id="data.edit"),
        Binding("n", "screen.problem(1)", "next problem", id="data.next"),
        Binding("x", "screen.export", "export", id="data.export"),
    ]

    class Filtered(Message):
        """What to search for has changed."""

        def __init__(self, text: str) -> None:
            super().__init__()
            self.text = text

    def contents(self) -> Iterable[Widget]:
        yield RowList()

    def filtered(self, text: str) -> None:
        self.post_message(self.Filtered(text))
