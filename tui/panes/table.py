"""Rows in columns: with a cursor, sorted by any column, narrowed by words, folded below heads."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from textual.binding import Binding, BindingType
from textual.content import Content
from textual.events import Click
from textual.message import Message

from tui.panes.lines import MOVE_KEYS, MUTED, Lines, wrapped
from tui.panes.menu import Menu

R = TypeVar("R")
MEASURED = 150  # rows at the beginning, and at the end, by which the width of a column is found
LEAST = 10  # cells of a column that fills what is left
GAP = 1  # cells between two columns
UNSORTED = ""
ONE_LINE = str.maketrans("\n\t", "  ")


@dataclass(frozen=True)
class Column(Generic[R]):
    """What a row shows in a column, and by what rows are sorted there: None comes last.

    A column without `order` cannot be sorted by. Where there is no room for all columns, those of
    the highest `rank` are left out, in a row also for a longer cell that `fills`; of rank 0 all are
    kept, and the table scrolls.
    """

    title: str
    cell: Callable[[R], Content | str]
    order: Callable[[R], Any] | None = None
    width: int = 0  # cells; 0: of the widest cell
    rank: int = 0
    right: bool = False
    largest_first: bool = False
    fills: bool = False  # of the room that is left: all if it has a width, or up to its widest cell


class Table(Lines, Generic[R]):
    """Rows, each with a `key` that stays when it is shown anew, so that the cursor stays on it.

    `parent`: the key of the row that a row is folded below. `words`: what the filter searches; else
    all that the row shows. `favourite`: what `>` sorts by first. Without `sideways`, ← → go on to
    the screen. Rows may be any sequence: only those that are seen, and MEASURED at each end, are
    asked for, unless it is sorted or narrowed. A row may be None until it is read.
    """

    ALLOW_SELECT = False  # a double click would select all

    BINDINGS: ClassVar[list[BindingType]] = [
        *MOVE_KEYS,
        Binding("enter", "open", "Open", show=False),
        Binding("space", "choose", "Choose", show=False),
        Binding("left", "sideways(-1)", "Fold, or to the left", show=False),
        Binding("right", "sideways(1)", "Unfold, or to the right", show=False),
        Binding("s", "sort", "Sort", show=False, id="table.sort"),
        Binding("less_than_sign", "sort_beside(-1)", "Sort by the column before", show=False),
        Binding("greater_than_sign", "sort_beside(1)", "Sort by the next column", show=False),
    ]

    @dataclass
    class Pointed(Message):
        """The cursor is on another row, or the row was shown anew."""

        table: "Table[Any]"
        row: Any

        @property
        def control(self) -> "Table[Any]":
            return self.table

    class Opened(Pointed):
        """Enter was pressed on a row, or it was clicked where the cursor is."""

    class Chosen(Pointed):
        """Space was pressed on a row."""

    def __init__(
        self,
        *,
        key: Callable[[R], Hashable],
        columns: Sequence[Column[R]] = (),
        parent: Callable[[R], Hashable | None] | None = None,
        words: Callable[[R], str] | None = None,
        nothing: Content | str = "",
        titles: bool = True,
        favourite: str = UNSORTED,
        sideways: bool = True,
        id: str | None = None,  # as Textual names it
    ) -> None:
        super().__init__(id=id)
        self._key, self._columns, self._above = key, columns, parent
        self._words = words or self._shown_words
        self.nothing = nothing  # a sentence in place of no rows
        self.head_height, self._sideways = int(titles), sideways
        self._favourite = favourite
        self.rows: Sequence[R] = ()
        self.shown: Sequence[R] = ()  # sorted, narrowed, unfolded
        self.folded: set[Hashable] = set()
        self.sorted_by, self.reverse = UNSORTED, False
        self.needle = ""
        self.cursor = 0
        self._told: R | None = None  # the row that was posted last
        self._widths: list[tuple[Column[R], int]] = []
        self._sentence: Sequence[Content] = ()  # `nothing` in the lines that it needs

    # What is shown

    def show(
        self,
        rows: Sequence[R],
        columns: Sequence[Column[R]] | None = None,
        *,
        line: int | None = None,
    ) -> None:
        """Show these rows. The cursor stays on its row, or on its line if that is gone, or goes to
        `line`.
        """
        self.rows = rows
        if columns is not None:
            self._columns = columns
        self._arrange(line)

    @property
    def pointed(self) -> R | None:
        """The row that the cursor is on."""
        return self.shown[self.cursor] if self.cursor < len(self.shown) else None

    @property
    def columns(self) -> Sequence[Column[R]]:
        """The columns that there is room for."""
        return [column for column, _ in self._widths]

    def texts(self) -> list[str]:
        """Every row as it is drawn."""
        return [self.line(number).plain.rstrip() for number in range(len(self.shown))]

    def point(self, key: Hashable) -> bool:
        """Move the cursor to a row, and unfold what it is in. False if there is none."""
        if self.folded and self._above:
            parents = (self._above(row) for row in self.rows if self._key(row) == key)
            self.folded.discard(next(parents, None))
            self._arrange()
        line = self._line_of(key)
        if line is not None:
            self.go_to(line)
        return line is not None

    def _line_of(self, key: Hashable) -> int | None:
        """The line of the row with this key."""
        if self._has_key(self.cursor, key):
            return self.cursor
        lines = (number for number in range(len(self.shown)) if self._has_key(number, key))
        return next(lines, None)

    def _has_key(self, line: int, key: Hashable) -> bool:
        row = self.shown[line] if line < len(self.shown) else None
        return row is not None and self._key(row) == key

    def filter(self, text: str) -> None:
        """Show only rows with all words of `text`, whatever the case, and the heads above them,
        which the cursor passes over.
        """
        self.needle = text.casefold()
        self._arrange()
        needles = self.needle.split()
        if self._above and self.pointed is not None and not self._fits(self.pointed, needles):
            fitting = (at for at, row in enumerate(self.shown) if self._fits(row, needles))
            self.go_to(next(fitting, 0))

    def sort(self, title: str) -> None:
        """Sort by the column of this title, the same again the other way; "" as they came."""
        self.reverse = bool(title) and title == self.sorted_by and not self.reverse
        self.sorted_by = title
        self._arrange()

    def _arrange(self, line: int | None = None) -> None:
        """Find the rows to show; the cursor stays on its row, or goes to a line."""
        before, at = self.pointed, self.cursor if line is None else line
        self.shown = self._shown_rows()
        if line is None and before is not None:
            found = self._line_of(self._key(before))
            at = at if found is None else found
        at = min(max(at, 0), max(len(self.shown) - 1, 0))
        has_moved, self.cursor = at != self.cursor, at
        self._measure()
        if has_moved:
            self.show_line(at)
        if self.pointed is not self._told:
            self._tell()

    def _tell(self) -> None:
        """Post the row that the cursor is on, unless it is not read yet."""
        self._told = self.pointed
        if self._told is not None:
            self.post_message(self.Pointed(self, self._told))

    def _shown_rows(self) -> Sequence[R]:
        rows, parent, needles = self.rows, self._above, self.needle.split()
        columns = (column for column in self._columns if column.order)
        column = next((column for column in columns if column.title == self.sorted_by), None)
        if needles or column:
            rows = [row for row in rows if row is not None]
        if needles:
            fitting = [row for row in rows if self._fits(row, needles)]
            keys = {self._key(row) for row in fitting}
            if parent:
                keys |= {parent(row) for row in fitting}
            rows = [row for row in rows if self._key(row) in keys]
        elif self.folded and parent and not column:
            rows = [row for row in rows if parent(row) not in self.folded]
        if column is None:
            return rows
        if parent:
            heads = {parent(row) for row in self.rows}
            rows = [row for row in rows if self._key(row) not in heads]
        return sorted_rows(rows, column, self.reverse)

    def _fits(self, row: R, needles: Sequence[str]) -> bool:
        words = self._words(row).casefold()
        return all(needle in words for needle in needles)

    def _shown_words(self, row: R) -> str:
        return "\n".join(str(column.cell(row)) for column in self._columns)

    # How it is drawn

    def lay_out(self) -> None:
        self._measure()
        self.show_line(self.cursor)

    def _measure(self) -> None:
        """Choose the columns that there is room for, and their widths."""
        wanted = {column: self._width_of(column) for column in self._columns}
        room, widths = self.width + GAP, dict[Column[R], int]()
        for column in sorted(self._columns, key=lambda column: column.rank):
            is_open = column.fills and not column.width
            width = min(wanted[column], LEAST) if is_open else wanted[column]
            if column.rank and room < width + GAP:
                break
            widths[column] = width
            room -= width + GAP
        for column, width in widths.items():
            if column.fills:
                more = room if column.width else min(wanted[column] - width, room)
                # rather cut short than moved sideways, unless nothing of it would be seen
                widths[column] += more if width + more >= LEAST // 2 else 0
                room -= more
        self._widths = [(column, widths[column]) for column in self._columns if column in widths]
        nothing = self.nothing
        if isinstance(nothing, str):
            nothing = Content.styled(nothing, MUTED)
        self._sentence = wrapped(nothing, max(self.width, LEAST)) if nothing else []
        total = sum(width + GAP for _, width in self._widths) - GAP
        if self.shown:
            self.set_size(max(total, 0), len(self.shown))
        else:
            self.set_size(0, len(self._sentence))

    def _width_of(self, column: Column[R]) -> int:
        """Cells of a column: as many as it wants, or as its widest text has."""
        if column.width:
            return column.width
        rows = self.shown
        if len(rows) > 2 * MEASURED:
            rows = [*rows[:MEASURED], *rows[-MEASURED:]]
        cells = [_content(column.cell(row)).cell_length for row in rows if row is not None]
        title = _content(column.title).cell_length + 2 * bool(column.order)
        return max(cells + [title] * self.head_height, default=0)

    def head(self) -> Content:
        if not self.shown:
            return Content("")
        parts = []
        for column, width in self._widths:
            title = column.title
            if column.order and column.title == self.sorted_by:
                title += " ▼" if column.largest_first != self.reverse else " ▲"
            parts.append(fitted(_content(title), width, column.right))
        return Content(" " * GAP).join(parts)

    def line(self, number: int) -> Content:
        if not self.shown:
            return self._sentence[number]
        row = self.shown[number]
        if row is None:
            return Content.styled("…", MUTED)
        parts = []
        for at, (column, width) in enumerate(self._widths, 1):
            cell, after = _content(column.cell(row)), self._widths[at:]
            if column.fills and cell.cell_length > width and all(each.rank for each, _ in after):
                # It takes the place of what can be left out.
                parts.append(fitted(cell, width + sum(GAP + width for _, width in after)))
                break
            parts.append(fitted(cell, width, column.right))
        return Content(" " * GAP).join(parts)

    def line_class(self, number: int) -> str:
        return "lines--cursor" if number == self.cursor and self.shown else ""

    # Keys and the mouse

    def go_to(self, line: int) -> None:
        """Move the cursor to a line."""
        line = min(max(line, 0), max(len(self.shown) - 1, 0))
        if line == self.cursor:
            return
        self.refresh_number(self.cursor)
        self.cursor = line
        self.refresh_number(line)
        self.show_line(line)
        self._tell()

    def action_move(self, by: int) -> None:
        self.go_to(self.cursor + by)

    def action_page(self, by: int) -> None:
        self.go_to(self.cursor + by * max(self.page_height - 1, 1))

    def action_first(self) -> None:
        self.go_to(0)

    def action_last(self) -> None:
        self.go_to(len(self.shown) - 1)

    def action_open(self) -> None:
        if self.pointed is not None:
            self.post_message(self.Opened(self, self.pointed))

    def action_choose(self) -> None:
        if self.pointed is not None:
            self.post_message(self.Chosen(self, self.pointed))

    def fold(self, key: Hashable, folded: bool) -> None:
        """Fold or unfold what is below a row; the cursor goes to that row."""
        line = self._line_of(key)
        if folded and line is not None:
            self.go_to(line)
        (self.folded.add if folded else self.folded.discard)(key)
        self._arrange()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Keys without an effect here go on to the screen."""
        if action == "sideways":
            wide = self.virtual_size.width > self.width
            return self._sideways and (self._above is not None or wide)
        if action in ("sort", "sort_beside"):
            return any(column.order for column in self._columns)
        return super().check_action(action, parameters)

    def action_sideways(self, by: int) -> None:
        """Fold or unfold the row, or what it is in; a table without folds scrolls."""
        row = self.pointed
        if self._above is None:
            self.scroll_relative(x=by * 8, animate=False)
        elif row is not None and not self.sorted_by:
            heads = {self._above(each) for each in self.rows}
            key = self._key(row) if self._key(row) in heads else self._above(row)
            if key is not None and (key in self.folded) != (by < 0):
                self.fold(key, by < 0)

    def action_sort(self) -> None:
        choices = {UNSORTED: "as they came"}
        for column in self._columns:
            if column.order:
                again = "  (again: the other way)" if column.title == self.sorted_by else ""
                choices[column.title] = f"{column.title}{again}"
        self.app.push_screen(Menu("Sort by", choices, self.sorted_by), self._sort_chosen)

    def _sort_chosen(self, title: str | None) -> None:
        if title is not None:
            self.sort(title)

    def action_sort_beside(self, by: int) -> None:
        """Sort by the next column that is shown, or the one before."""
        titles = [UNSORTED, *(column.title for column in self.columns if column.order)]
        at = titles.index(self.sorted_by) if self.sorted_by in titles else 0
        if not self.sorted_by and self._favourite and self._favourite in titles:
            at = titles.index(self._favourite) - by
        self.sorted_by, self.reverse = UNSORTED, False
        self.sort(titles[(at + by) % len(titles)])

    def on_click(self, event: Click) -> None:
        line = event.y - self.head_height + round(self.scroll_offset.y)
        if event.y < self.head_height:
            self._click_title(event.x + round(self.scroll_offset.x))
        elif line == self.cursor:
            self.action_open()
        elif line < len(self.shown):
            self.go_to(line)

    def _click_title(self, x: int) -> None:
        stop = 0
        for column, width in self._widths:
            stop += width + GAP
            if x < stop:
                if column.order:
                    self.sort(column.title)
                return


def sorted_rows(rows: Sequence[R], column: Column[R], reverse: bool) -> list[R]:
    """Sorted by a column's order, or with `reverse` the other way; without a value last in both."""
    assert column.order
    values = [(column.order(row), row) for row in rows]
    known = [pair for pair in values if _is_value(pair[0])]
    known.sort(key=lambda pair: pair[0], reverse=column.largest_first != reverse)
    return [row for _, row in known] + [row for value, row in values if not _is_value(value)]


def _is_value(value: Any) -> bool:
    """Whether rows can be sorted by it: neither None nor NaN."""
    return value is not None and bool(value == value)


def fitted(content: Content, width: int, right: bool = False) -> Content:
    """The text in exactly `width` cells; what is longer ends with …"""
    content = content.truncate(width, ellipsis=True)
    space = width - content.cell_length
    return content.pad_left(space) if right else content.pad_right(space)


def _content(cell: Content | str) -> Content:
    """A cell's text in one line."""
    content = cell if isinstance(cell, Content) else Content(cell)
    if content.plain.isprintable():
        return content
    return Content(content.plain.translate(ONE_LINE), list(content.spans))
