"""Rows in columns: with a cursor, sorted by any column, narrowed by words, folded below heads."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar, Generic, TypeVar

from textual import work
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.events import Click

from tui.panes.lines import MUTED, FromPane, Lines, wrapped
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
        Binding("enter", "open", "Open", show=False),
        Binding("space", "choose", "Choose", show=False),
        Binding("left", "sideways(-1)", "Fold, or to the left", show=False),
        Binding("right", "sideways(1)", "Unfold, or to the right", show=False),
        Binding("s", "sort", "Sort", show=False, id="table.sort"),
        Binding("less_than_sign", "sort_beside(-1)", "Sort by the column before", show=False),
        Binding("greater_than_sign", "sort_beside(1)", "Sort by the next column", show=False),
    ]

    @dataclass
    class Pointed(FromPane):
        """The cursor is on another row, or the row was shown anew."""

        row: Any

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
        self._key, self._columns = key, columns
        self._folds, self._above = parent is not None, parent or (lambda _: None)
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
        return self._row(self.cursor)

    def _row(self, line: int) -> R | None:
        return self.shown[line] if line < len(self.shown) else None

    @property
    def columns(self) -> Sequence[Column[R]]:
        """The columns that there is room for."""
        return [column for column, _ in self._widths]

    def texts(self) -> list[str]:
        """Every row as it is drawn."""
        return [self.line(number).plain.rstrip() for number in range(len(self.shown))]

    def point(self, key: Hashable) -> bool:
        """Move the cursor to a row, and unfold what it is in. False if there is none."""
        if self.folded:
            parents = (self._above(row) for row in self.rows if self._key(row) == key)
            self.folded.discard(next(parents, None))
            self._arrange()
        line = self._line_of(key)
        if line is not None:
            self.go_to(line)
        return line is not None

    def _line_of(self, key: Hashable) -> int | None:
        """The line of the row with this key."""
        for line in chain([self.cursor], range(len(self.shown))):
            row = self._row(line)
            if row is not None and self._key(row) == key:
                return line
        return None

    def filter(self, text: str) -> None:
        """Show only rows with all words of `text`, whatever the case, and the heads above them,
        which the cursor passes over.
        """
        self.needle = text.casefold()
        self._arrange()
        needles = self.needle.split()
        if self.pointed is not None and not self._fits(self.pointed, needles):
            fitting = (at for at, row in enumerate(self.shown) if self._fits(row, needles))
            self.go_to(next(fitting, 0))

    def sort(self, title: str) -> None:
        """Sort by the column of this title, the same again the other way; "" as they came."""
        self.reverse = bool(title) and title == self.sorted_by and not self.reverse
        self.sorted_by = title
        self._arrange()

    def _arrange(self, line: int | None = None) -> None:
        """Find the rows to show; the cursor stays on its row, or goes to a line."""
        before, at = self.pointed, line
        self.shown = self._shown_rows()
        if line is None and before is not None:
            at = self._line_of(self._key(before))
        at = self._nearest(self.cursor if at is None else at)
        has_moved, self.cursor = at != self.cursor, at
        self._measure()
        if has_moved:
            self.show_line(at)
        if self.pointed is not self._told:
            self._tell()

    def _nearest(self, line: int) -> int:
        """A line, or the first or last."""
        return max(min(line, len(self.shown) - 1), 0)

    def _tell(self) -> None:
        self._told = self.pointed
        self._post(self.Pointed)

    def _post(self, kind: type[Pointed]) -> None:
        """Post a message about the row that the cursor is on, unless it is not read yet."""
        if self.pointed is not None:
            self.post_message(kind(self, self.pointed))

    def _shown_rows(self) -> Sequence[R]:
        rows, key, above, needles = self.rows, self._key, self._above, self.needle.split()
        columns = (column for column in self._columns if column.order)
        column = next((column for column in columns if column.title == self.sorted_by), None)
        if needles or column:
            rows = [row for row in rows if row is not None]
        if needles:
            fitting = [row for row in rows if self._fits(row, needles)]
            keys = {each(row) for each in (key, above) for row in fitting}
            rows = [row for row in rows if key(row) in keys]
        elif self.folded and not column:
            rows = [row for row in rows if above(row) not in self.folded]
        if column:
            heads = self._heads()
            rows = sorted_rows([row for row in rows if key(row) not in heads], column, self.reverse)
        return rows

    def _heads(self) -> set[Hashable]:
        """The keys of rows that others are folded below."""
        return {self._above(row) for row in self.rows if row is not None}

    def _fits(self, row: R, needles: Sequence[str]) -> bool:
        return all(needle in self._words(row).casefold() for needle in needles)

    def _shown_words(self, row: R) -> str:
        return "\n".join(str(column.cell(row)) for column in self._columns)

    # How it is drawn

    def lay_out(self) -> None:
        self._measure()
        self.show_line(self.cursor)

    def _measure(self) -> None:
        """Choose the columns that there is room for, and their widths."""
        widest = {column: column.width or self._widest(column) for column in self._columns}
        room, widths = self.width + GAP, dict[Column[R], int]()
        for column in sorted(self._columns, key=lambda column: column.rank):
            width = min(widest[column], LEAST) if column.fills else widest[column]
            if column.rank and room < width + GAP:
                break
            widths[column] = width
            room -= width + GAP
        for column, width in widths.items():
            if column.fills:
                more = room if column.width else min(widest[column] - width, room)
                widths[column] += max(more, 0)
                room -= max(more, 0)
        self._widths = [(column, widths[column]) for column in self._columns if column in widths]
        self._set_lines()

    def _set_lines(self) -> None:
        """Find the lines: the rows, or a sentence in place of them."""
        nothing = self.nothing
        if isinstance(nothing, str):
            nothing = Content.styled(nothing, MUTED)
        self._sentence = wrapped(nothing, max(self.width, LEAST)) if nothing else []
        if self.shown:
            total = sum(width + GAP for _, width in self._widths)
            self.set_size(max(total - GAP, 0), len(self.shown))
        else:
            self.set_size(0, len(self._sentence))

    def _widest(self, column: Column[R]) -> int:
        """Cells of the widest text in a column."""
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
        line = self._nearest(line)
        if line == self.cursor:
            return
        self.refresh_number(self.cursor)
        self.cursor = line
        self.refresh_number(line)
        self.show_line(line)
        self._tell()

    def action_move(self, by: int) -> None:
        self.go_to(self.cursor + by)

    def action_open(self) -> None:
        self._post(self.Opened)

    def action_choose(self) -> None:
        self._post(self.Chosen)

    def fold(self, key: Hashable, folded: bool) -> None:
        """Fold or unfold what is below a row; the cursor goes to that row."""
        line = self._line_of(key) if folded else None
        (self.folded.add if folded else self.folded.discard)(key)
        self._arrange(line)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Keys without an effect here go on to the screen."""
        if action == "sideways":
            return self._sideways and (self._folds or self.virtual_size.width > self.width)
        if action in ("sort", "sort_beside"):
            return any(column.order for column in self._columns)
        return super().check_action(action, parameters)

    def action_sideways(self, by: int) -> None:
        """Fold or unfold the row, or what it is in; a table without folds scrolls."""
        row = self.pointed
        if not self._folds:
            self.scroll_relative(x=by * 8, animate=False)
        elif row is not None and not self.sorted_by:
            key = self._key(row) if self._key(row) in self._heads() else self._above(row)
            if key is not None:
                self.fold(key, by < 0)

    @work
    async def action_sort(self) -> None:
        choices = {UNSORTED: "as they came"}
        for column in self._columns:
            if column.order:
                again = "  (again: the other way)" if column.title == self.sorted_by else ""
                choices[column.title] = f"{column.title}{again}"
        title = await self.app.push_screen_wait(Menu("Sort by", choices, self.sorted_by))
        if title is not None:
            self.sort(title)

    def action_sort_beside(self, by: int) -> None:
        """Sort by the next column that is shown, or the one before."""
        titles = [UNSORTED, *(column.title for column in self.columns if column.order)]
        at = titles.index(self.sorted_by) if self.sorted_by in titles else 0
        if not self.sorted_by and self._favourite and self._favourite in titles:
            at = titles.index(self._favourite) - by
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
    known = [row for row in rows if _is_value(column.order(row))]
    others = [row for row in rows if not _is_value(column.order(row))]
    return sorted(known, key=column.order, reverse=column.largest_first != reverse) + others


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
