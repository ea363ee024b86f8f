"""Rows in columns: with a cursor, sorted by any column, narrowed by words, folded below heads."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from textual.binding import Binding, BindingType
from textual.content import Content
from textual.events import Click, Resize
from textual.message import Message

from tui.dialogs import Menu
from tui.panes.lines import MOVE_KEYS, Lines

R = TypeVar("R")
MEASURED = 300  # rows by which the width of a column is found
LEAST = 10  # cells of a column that fills what is left
GAP = 1  # cells between two columns
UNSORTED = ""


@dataclass(frozen=True)
class Column(Generic[R]):
    """What a row shows in a column, and by what rows are sorted there: None comes last.

    A column without `order` cannot be sorted by. Where there is no room for all columns, those of
    the highest `rank` are left out; of rank 0 all are kept, and the table scrolls.
    """

    title: str
    cell: Callable[[R], Content | str]
    order: Callable[[R], Any] | None = None
    width: int = 0  # cells; 0: of the widest cell
    rank: int = 0
    right: bool = False
    largest_first: bool = False
    fills: bool = False  # shrinks to the room that the others leave


class Table(Lines, Generic[R]):
    """Rows, each with a `key` that stays when it is shown anew, so that the cursor stays on it.

    `parent`: the key of the row that a row is folded below. `words`: what the filter searches; else
    all that the row shows. Rows may be any sequence: only those that are seen are asked for, unless
    it is sorted or narrowed.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        *MOVE_KEYS,
        Binding("enter", "open", "Open", show=False),
        Binding("space", "choose", "Choose", show=False),
        Binding("left", "sideways(-1)", "Fold, or to the left", show=False),
        Binding("right", "sideways(1)", "Unfold, or to the right", show=False),
        Binding("s", "sort", "Sort", show=False),
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
        nothing: str = "",
        titles: bool = True,
        id: str | None = None,  # as Textual names it
    ) -> None:
        super().__init__(id=id)
        self._key, self._columns, self._above = key, columns, parent
        self._words = words or self._shown_words
        self.nothing = nothing  # a sentence in place of no rows
        self.head_height = int(titles)
        self.rows: Sequence[R] = ()
        self.shown: Sequence[R] = ()  # sorted, narrowed, unfolded
        self.folded: set[Hashable] = set()
        self.sorted_by, self.reverse = UNSORTED, False
        self.needle = ""
        self.cursor = 0
        self._widths: list[tuple[Column[R], int]] = []

    # What is shown

    def show(self, rows: Sequence[R], columns: Sequence[Column[R]] | None = None) -> None:
        """Show these rows. The cursor stays on its row, or on its line if that is gone."""
        self.rows = rows
        if columns is not None:
            self._columns = columns
        self._arrange()

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
        return [self._row(row).plain.rstrip() for row in self.shown]

    def point(self, key: Hashable) -> bool:
        """Move the cursor to a row, and unfold what it is in. False if there is none."""
        row = next((row for row in self.rows if self._key(row) == key), None)
        if row is None:
            return False
        if self._above and self._above(row) in self.folded:
            self.folded.discard(self._above(row))
            self._arrange()
        keys = [self._key(each) for each in self.shown]
        if key in keys:
            self._go_to(keys.index(key))
        return key in keys

    def filter(self, text: str) -> None:
        """Show only rows with all words of `text`, whatever the case, and the heads above them."""
        self.needle = text.casefold()
        self._arrange()

    def sort(self, title: str) -> None:
        """Sort by the column of this title, the same again the other way; "" as they came."""
        self.reverse = bool(title) and title == self.sorted_by and not self.reverse
        self.sorted_by = title
        self._arrange()

    def _arrange(self) -> None:
        """Find the rows to show; the cursor stays on its row."""
        before = self.pointed
        key = None if before is None else self._key(before)
        self.shown = self._shown_rows()
        same_line = self.cursor < len(self.shown) and self._key_at(self.cursor) == key
        if before is not None and not same_line:
            places = (n for n, row in enumerate(self.shown) if self._key(row) == key)
            self.cursor = next(places, min(self.cursor, max(len(self.shown) - 1, 0)))
        self._lay_out()
        self.show_line(self.cursor)
        if self.pointed is not before and self.pointed is not None:
            self.post_message(self.Pointed(self, self.pointed))

    def _key_at(self, line: int) -> Hashable:
        row = self.shown[line]
        return None if row is None else self._key(row)

    def _shown_rows(self) -> Sequence[R]:
        rows, parent, needles = self.rows, self._above, self.needle.split()
        if needles:
            fitting = [row for row in rows if self._fits(row, needles)]
            heads = {parent(row) for row in fitting} if parent else set()
            keys = {self._key(row) for row in fitting}
            rows = [row for row in rows if self._key(row) in heads or self._key(row) in keys]
        elif parent and not self.sorted_by:
            rows = [row for row in rows if parent(row) not in self.folded]
        column = next((column for column in self._columns if column.title == self.sorted_by), None)
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

    def _lay_out(self) -> None:
        """Choose the columns that there is room for, and their widths."""
        measured = [row for row in self.shown[:MEASURED] if row is not None]
        wide = {}
        for column in self._columns:
            cells = [_content(column.cell(row)).cell_length for row in measured]
            title = len(column.title) + 2 * bool(column.order) if self.head_height else 0
            wide[column.title] = column.width or max([title, *cells], default=0)
        room = self.width
        filling = [column for column in self._columns if column.fills]
        kept = []
        for column in sorted(self._columns, key=lambda column: column.rank):
            width = min(wide[column.title], LEAST) if column.fills else wide[column.title]
            if column.rank and room < width + GAP:
                break
            kept.append(column)
            room -= width + GAP
        for column in filling:
            least = min(wide[column.title], LEAST)
            wide[column.title] = min(wide[column.title], max(least + room, least))
        self._widths = [(column, wide[column.title]) for column in self._columns if column in kept]
        total = sum(width + GAP for _, width in self._widths)
        self.set_size(total, len(self.shown) or bool(self.nothing))

    def head(self) -> Content:
        if not self.shown:
            return Content("")
        parts = []
        for column, width in self._widths:
            title = column.title
            if column.title == self.sorted_by:
                title += " ▼" if column.largest_first != self.reverse else " ▲"
            parts.append(fitted(Content(title), width, column.right))
        return Content(" " * GAP).join(parts)

    def line(self, number: int) -> Content:
        if not self.shown:
            return Content.styled(self.nothing, "$text-muted")
        row = self.shown[number]
        return Content.styled("…", "$text-muted") if row is None else self._row(row)

    def _row(self, row: R) -> Content:
        parts = [
            fitted(_content(column.cell(row)), width, column.right)
            for column, width in self._widths
        ]
        return Content(" " * GAP).join(parts)

    def line_class(self, number: int) -> str:
        return "lines--cursor" if number == self.cursor and self.shown else ""

    def on_resize(self, _: Resize) -> None:
        self._lay_out()
        self.show_line(self.cursor)

    # Keys and the mouse

    def _go_to(self, line: int) -> None:
        line = min(max(line, 0), max(len(self.shown) - 1, 0))
        if line == self.cursor:
            return
        self.refresh_number(self.cursor)
        self.cursor = line
        self.refresh_number(line)
        self.show_line(line)
        if self.pointed is not None:
            self.post_message(self.Pointed(self, self.pointed))

    def action_move(self, by: int) -> None:
        self._go_to(self.cursor + by)

    def action_page(self, by: int) -> None:
        self._go_to(self.cursor + by * max(self.page_height - 1, 1))

    def action_first(self) -> None:
        self._go_to(0)

    def action_last(self) -> None:
        self._go_to(len(self.shown) - 1)

    def action_open(self) -> None:
        if self.pointed is not None:
            self.post_message(self.Opened(self, self.pointed))

    def action_choose(self) -> None:
        if self.pointed is not None:
            self.post_message(self.Chosen(self, self.pointed))

    def fold(self, key: Hashable, folded: bool) -> None:
        """Fold or unfold what is below a row; the cursor goes to that row."""
        (self.folded.add if folded else self.folded.discard)(key)
        keys = [self._key(row) for row in self.shown]
        if folded and key in keys:
            self._go_to(keys.index(key))
        self._arrange()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Keys without an effect here go on to the screen."""
        if action == "sideways":
            return self._above is not None or self.virtual_size.width > self.width
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
        self.sorted_by, self.reverse = UNSORTED, False
        self.sort(titles[(at + by) % len(titles)])

    def on_click(self, event: Click) -> None:
        line = event.y - self.head_height + round(self.scroll_offset.y)
        if event.y < self.head_height:
            self._click_title(event.x + round(self.scroll_offset.x))
        elif line == self.cursor:
            self.action_open()
        elif line < len(self.shown):
            self._go_to(line)

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
    known = [pair for pair in values if pair[0] is not None]
    known.sort(key=lambda pair: pair[0], reverse=column.largest_first != reverse)
    return [row for _, row in known] + [row for value, row in values if value is None]


def fitted(content: Content, width: int, right: bool = False) -> Content:
    """The text in exactly `width` cells; what is longer ends with …"""
    content = content.truncate(width, ellipsis=True)
    space = width - content.cell_length
    return content.pad_left(space) if right else content.pad_right(space)


def _content(cell: Content | str) -> Content:
    return cell if isinstance(cell, Content) else Content(cell)
