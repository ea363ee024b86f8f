"""A table of rows of any type: sorted by any column, filtered by text, with marks on rows."""

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from rich.text import Text
from textual.binding import Binding, BindingType
from textual.coordinate import Coordinate
from textual.events import Click, Resize
from textual.message import Message
from textual.widgets import DataTable

R = TypeVar("R")
WIDE = 110  # terminal width from which `wide` columns are shown


@dataclass(frozen=True)
class Column(Generic[R]):
    """A column: the text of a row, and the value to sort by (None: unknown, sorted last)."""

    label: str
    text: Callable[[R], str]
    value: Callable[[R], Any]
    right: bool = False
    wide: bool = False  # shown on wide terminals only; the filter searches it anyway


class Table(DataTable[Text], Generic[R]):
    """Shows rows by `columns`; a column of marks comes first.

    `key` identifies a row across calls of `show`, so that the cursor stays on it. `order` is the sort key while no
    column is chosen, `style` the style of a row's text.

        table = Table((Column("name", ...), Column("size", ..., right=True)), key=..., order=...)
        table.show(rows, marked=keys)   # all rows; those whose key is in `marked` get a ●
        table.filter("lora")            # only rows with this text in any column; "" shows all
        table.sort_next()               # by the next column, after the last by `order`; a click on a header sorts too
        table.reverse()
        table.pointed                   # the row under the cursor, or None

    Messages: `Pointed` (the cursor moved to another row, or the rows changed; read `pointed`), `Marked` (the mark of
    `row` was clicked), `Chosen` (Enter). The table never changes marks itself: the screen calls `show` again.
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "choose", "Choose the row", show=False)]

    class Pointed(Message):
        """The cursor moved to another row, or to none."""

    class Chosen(Message):
        """Enter was pressed."""

    @dataclass
    class Marked(Message):
        """The mark of a row was clicked."""

        row: Any

    def __init__(
        self,
        columns: Sequence[Column[R]],
        key: Callable[[R], Hashable],
        order: Callable[[R], Any],
        style: Callable[[R], str] = lambda _: "",
        *,
        id: str | None = None,
    ) -> None:
        super().__init__(cursor_type="row", cell_padding=0, id=id)
        self._all_columns, self._key, self._order, self._style = columns, key, order, style
        self._all_rows: Sequence[R] = ()
        self._texts: dict[Hashable, tuple[R, list[str]]] = {}  # key → row, its texts in all columns
        self._marked: Collection[Hashable] = ()
        self._needle = ""
        self._sort_column: Column[R] | None = None
        self._descending = False
        # What is drawn now. The grid has the header in its first line, and marks in its first column.
        self._drawn_columns: list[Column[R]] = []
        self._drawn_rows: list[R] = []
        self._grid: list[list[tuple[str, str]]] = []  # text and style

    @property
    def pointed(self) -> R | None:
        """The row under the cursor."""
        return self._drawn_rows[self.cursor_row] if 0 <= self.cursor_row < len(self._drawn_rows) else None

    def show(self, rows: Sequence[R], marked: Collection[Hashable] = ()) -> None:
        """Replace all rows and the keys of those that are marked."""
        before, self._texts = self._texts, {}
        for row in rows:
            known = before.get(key := self._key(row))
            # Texts are kept while a row is the same object: a filter looks at all of them at every key.
            same = known is not None and known[0] is row
            self._texts[key] = known if known and same else (row, [column.text(row) for column in self._all_columns])
        self._all_rows, self._marked = rows, frozenset(marked)
        self._draw()

    def filter(self, needle: str) -> None:
        """Show only rows with `needle` in any column, hidden ones included; upper and lower case are the same."""
        self._needle = needle.casefold()
        self._draw()

    def sort_next(self) -> None:
        """Sort by the next column shown; after the last, by `order`."""
        choices = [None, *self._columns_shown()]
        index = choices.index(self._sort_column) + 1 if self._sort_column in choices else 0
        self._sort_column, self._descending = choices[index % len(choices)], False
        self._draw()

    def reverse(self) -> None:
        """Sort the other way."""
        self._descending = not self._descending
        self._draw()

    def _columns_shown(self) -> list[Column[R]]:
        return [column for column in self._all_columns if self.app.size.width >= WIDE or not column.wide]

    def _rows_shown(self) -> list[R]:
        """The rows with the filter's text, sorted; those without a value last in both directions."""
        rows = [r for r in self._all_rows if any(self._needle in t.casefold() for t in self._texts[self._key(r)][1])]
        value = self._sort_column.value if self._sort_column else self._order
        known = [row for row in rows if value(row) is not None]
        return sorted(known, key=value, reverse=self._descending) + [row for row in rows if value(row) is None]

    def _draw(self) -> None:
        """Update only the cells that changed if rows, columns and widths are the same: rebuilding the table is slow."""
        rows, columns = self._rows_shown(), self._columns_shown()
        grid: list[list[tuple[str, str]]] = [[("", "")]]
        grid += [[("●" if self._key(row) in self._marked else " ", "bold")] for row in rows]
        gap = " " if len(columns) == len(self._all_columns) else "  "
        styles = ["", *map(self._style, rows)]
        for number, column in enumerate(self._all_columns):
            if column not in columns:
                continue
            sign = "" if column is not self._sort_column else "▼" if self._descending else "▲"
            texts = [column.label + sign, *(self._texts[self._key(row)][1][number] for row in rows)]
            width = max(map(len, texts))
            for line, text, style in zip(grid, texts, styles, strict=True):
                line.append(((text.rjust(width) if column.right else text.ljust(width)) + gap, style))
        pointed, index = self.pointed, self.cursor_row
        keys = list(map(self._key, rows))
        unchanged = self._grid and self._grid[0] == grid[0] and list(map(self._key, self._drawn_rows)) == keys
        before, self._grid, self._drawn_rows, self._drawn_columns = self._grid, grid, rows, columns
        if unchanged:
            for y, (old, new) in enumerate(zip(before[1:], grid[1:], strict=True)):
                for x, (was, now) in enumerate(zip(old, new, strict=True)):
                    if was != now:
                        self.update_cell_at(Coordinate(y, x), Text(*now))
            return
        self.clear(columns=True)
        self.add_column("", width=2)
        for text, _ in grid[0][1:]:
            self.add_column(Text(text))
        for line in grid[1:]:
            self.add_row(*(Text(*cell) for cell in line))
        stays = pointed is not None and (key := self._key(pointed)) in keys
        self.move_cursor(row=keys.index(key) if stays else min(index, len(keys) - 1), animate=False)
        self.post_message(self.Pointed())

    def on_resize(self, _: Resize) -> None:
        self._draw()

    def on_data_table_row_highlighted(self, event: DataTable.RowHighlighted) -> None:
        event.stop()
        self.post_message(self.Pointed())

    def on_data_table_header_selected(self, event: DataTable.HeaderSelected) -> None:
        event.stop()
        if event.column_index > 0:  # not the marks
            column = self._drawn_columns[event.column_index - 1]
            self._descending = not self._descending if column is self._sort_column else False
            self._sort_column = column
            self._draw()

    def on_click(self, event: Click) -> None:
        row, column = event.style.meta.get("row", -1), event.style.meta.get("column", -1)
        if row >= 0 and column == 0:
            self.post_message(self.Marked(self._drawn_rows[row]))

    def action_choose(self) -> None:
        self.post_message(self.Chosen())
