"""A pane with a table that is sorted by any column and narrowed by words: of models, of a sweep's
adapters."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from rich.text import Text
from textual import on
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widget import Widget
from textual.widgets import DataTable, Static

from tui.dialogs import Menu
from tui.widgets.pane import Pane
from tui.widgets.table import Table

R = TypeVar("R")
SORTED = "▾"


class Column(NamedTuple):
    """A column: its cell for a row, and what it is sorted by; None, or what is missing, comes
    last.
    """

    title: str
    cell: Callable[[Any], Text]
    order: Callable[[Any], Any]


class RowsPane(Pane, Generic[R]):
    """Subclasses implement `key_of`, `words_of`, and call `fill`. Without rows, a sentence says
    why.
    """

    FILTER = True
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("s", "sort", "sort", id="results.sort"),
        Binding(
            "less_than_sign",
            "next_column(-1)",
            "Sort by the previous column",
            show=False,
            key_display="<",
        ),
        Binding(
            "greater_than_sign",
            "next_column(1)",
            "Sort by the next column",
            show=False,
            key_display=">",
        ),
    ]
    DEFAULT_CSS = """
    RowsPane > .empty { display: none; height: auto; padding: 1 0; }
    RowsPane.-empty > .empty { display: block; }
    RowsPane.-empty > Table { display: none; }
    """

    class Pointed(Message):
        """The cursor is on another row."""

        def __init__(self, pane: "RowsPane[Any]", row: Any) -> None:
            super().__init__()
            self.pane, self.row = pane, row

    class Asked(Message):
        """The user wants something done with the row that the cursor is on: "chat", "open", …"""

        def __init__(self, pane: "RowsPane[Any]", what: str, row: Any) -> None:
            super().__init__()
            self.pane, self.what, self.row = pane, what, row

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.columns: list[Column] = []
        self.sorted_by = ""
        self.rows: list[R] = []  # that are shown, in their order
        self._all: Sequence[R] = ()

    def contents(self) -> Iterable[Widget]:
        # a model keeps its colour under the cursor
        yield Table(cursor_foreground_priority="renderable")
        yield Static(classes="empty", markup=False)

    def key_of(self, row: R) -> str:
        """What names the row."""
        raise NotImplementedError

    def words_of(self, row: R) -> str:
        """What the filter searches."""
        return self.key_of(row)

    @property
    def table(self) -> Table:
        return self.query_one(Table)

    @property
    def pointed(self) -> R | None:
        """The row that the cursor is on."""
        at = self.table.cursor_row
        return self.rows[at] if 0 <= at < len(self.rows) else None

    def say(self, text: str) -> None:
        """Show a sentence instead of the table."""
        self._all, self.rows = (), []
        self.add_class("-empty")
        self.query_one(".empty", Static).update(text)
        self.show_title()

    def fill(self, rows: Sequence[R], columns: Iterable[Column], at: str = "") -> None:
        """Show rows; the cursor stays on its row, at first on the one named `at`."""
        self.remove_class("-empty")
        key = self.key_of(self.pointed) if self.pointed else at
        self._all, self.columns = rows, list(columns)
        self._arrange(key)

    def _arrange(self, key: str) -> None:
        """Filter, sort and draw the rows, with the cursor on the one of this key."""
        by = next((column for column in self.columns if column.title == self.sorted_by), None)
        words = self.filter_text.casefold().split()
        rows = [
            row for row in self._all if all(word in self.words_of(row).casefold() for word in words)
        ]
        self.rows = sorted(rows, key=lambda row: _last_if_missing(by, row)) if by else rows
        with self.app.batch_update():
            self.table.clear(columns=True)
            cells = [[column.cell(row) for row in self.rows] for column in self.columns]
            for column, texts in zip(self.columns, cells, strict=True):
                title = Text(
                    f"{column.title} {SORTED}" if column is by else column.title, no_wrap=True
                )
                # the table's own measure is of the rows before, where it is filled twice in a
                # moment
                self.table.add_column(
                    title, key=column.title, width=max(text.cell_len for text in (title, *texts))
                )
            for row, line in zip(self.rows, zip(*cells, strict=True), strict=True):
                self.table.add_row(*line, key=self.key_of(row))
            self.point(key)
        if self.pointed is not None:
            self.post_message(self.Pointed(self, self.pointed))

    def point(self, key: str) -> None:
        """Move the cursor to a row, if it is shown."""
        keys = [self.key_of(row) for row in self.rows]
        if key in keys:
            self.table.move_cursor(row=keys.index(key), animate=False)

    def sort_by(self, title: str | None) -> None:
        """Sort by a column; the cursor stays on its row."""
        if title is not None and self.columns:
            self.sorted_by = title
            self._arrange(self.key_of(self.pointed) if self.pointed else "")

    def filtered(self, text: str) -> None:  # noqa: ARG002  # name given by Pane
        if self.columns:
            self._arrange(self.key_of(self.pointed) if self.pointed else "")

    def action_sort(self) -> None:
        titles = {column.title: column.title for column in self.columns}
        if titles:
            self.app.push_screen(Menu("Sort by", titles, self.sorted_by), self.sort_by)

    def action_next_column(self, by: int) -> None:
        titles = [column.title for column in self.columns]
        if titles:
            at = titles.index(self.sorted_by) if self.sorted_by in titles else -1
            self.sort_by(titles[(at + by) % len(titles)])

    def action_ask(self, what: str) -> None:
        if (row := self.pointed) is not None:
            self.post_message(self.Asked(self, what, row))

    @on(DataTable.RowHighlighted)
    def _row_pointed(self, event: DataTable.RowHighlighted) -> None:
        event.stop()
        if (row := self.pointed) is not None:
            self.post_message(self.Pointed(self, row))

    @on(DataTable.RowSelected)
    def _row_selected(self, event: DataTable.RowSelected) -> None:
        event.stop()
        self.action_ask("enter")


def _last_if_missing(column: Column, row: Any) -> tuple[bool, Any]:
    try:
        value = column.order(row)
    except (KeyError, TypeError):
        value = None
    return value is None, 0 if value is None else value
