"""The table of models: sortable by any column, filterable, with a selection."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

from rich.text import Text
from textual.binding import Binding, BindingType
from textual.events import Click, Resize
from textual.message import Message
from textual.widgets import DataTable

from pipeline.files.text import natural_sort_key
from pipeline.inference.catalog import REFUSED, UNBOUND, VERIFIED
from tui.screens.adapters.session.catalog import Entry

CHECKING = "checking…"
SIGNS = {VERIFIED: "✓", UNBOUND: "?", REFUSED: "✗", CHECKING: " "}
ALL_FROM = 110  # terminal width from which all columns are shown
MARK = "mark"  # the column's key
Cell = tuple[str, str]  # text and style


@dataclass(frozen=True)
class Column:
    """A column: the text for a model, and the value to sort by (None: unknown, sorted last)."""

    label: str
    text: Callable[[Entry], str]
    value: Callable[[Entry], Any]
    right: bool = False
    wide: bool = False  # shown on wide terminals only


def state(entry: Entry) -> str:
    return entry.verdict.state if entry.verdict else CHECKING


def _format_number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _format_size(entry: Entry) -> str:
    """The size in decimal units."""
    for unit, name, form in ((1e9, "GB", ".2f"), (1e6, "MB", ".1f"), (1e3, "kB", ".0f")):
        if entry.model.size >= unit:
            return f"{entry.model.size / unit:{form}} {name}"
    return f"{entry.model.size} B"


def short_targets(targets: Sequence[str]) -> str:
    return " ".join(target.removesuffix("_proj").removesuffix(" tokens") for target in targets) or "–"


def _forgetting(entry: Entry) -> float | None:
    return entry.verdict.forgetting if entry.verdict else None


def _format_time(entry: Entry) -> str:
    when = entry.model.when
    return "–" if when is None else f"{datetime.fromtimestamp(when):%d %b %H:%M}"


COLUMNS = (
    Column("name", lambda e: e.label, lambda e: natural_sort_key(e.label)),
    Column("kind", lambda e: e.model.kind, lambda e: e.model.kind, wide=True),
    Column("method", lambda e: e.model.method.removesuffix("_tuning"), lambda e: e.model.method),
    Column("rank", lambda e: _format_number(e.model.rank, "d"), lambda e: e.model.rank, right=True),
    Column("targets", lambda e: short_targets(e.model.targets), lambda e: e.model.targets or None, wide=True),
    Column("base", lambda e: Path(e.model.base or "–").name, lambda e: e.model.base, wide=True),
    Column(
        "params",
        lambda e: _format_number(e.model.parameters, ",d"),
        lambda e: e.model.parameters,
        right=True,
        wide=True,
    ),
    Column("size", _format_size, lambda e: e.model.size, right=True, wide=True),
    Column("loss", lambda e: _format_number(e.model.final_loss, ".3f"), lambda e: e.model.final_loss, right=True),
    Column("forgot", lambda e: _format_number(_forgetting(e), "+.3f"), _forgetting, right=True),
    Column("when", _format_time, lambda e: e.model.when, wide=True),
    Column("state", lambda e: f"{SIGNS[state(e)]} {state(e)}", state),
)


def _pad_column(texts: Sequence[str], right: bool, gap: int) -> list[str]:
    """Pad all texts to the widest, plus a gap."""
    width = max(map(len, texts))
    return [(text.rjust(width) if right else text.ljust(width)) + " " * gap for text in texts]


class ModelTable(DataTable[Text]):
    """Posts which model the cursor is on, which was marked, and which was chosen with Enter."""

    DEFAULT_CSS = "ModelTable { height: 1fr; }"
    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "choose", "Prompt it", show=False)]

    class Pointed(Message):
        """The cursor moved to another model, or to none."""

        def __init__(self, path: Path | None) -> None:
            super().__init__()
            self.path = path

    class Marked(Message):
        """The mark of a model was clicked."""

        def __init__(self, path: Path) -> None:
            super().__init__()
            self.path = path

    class Chosen(Message):
        """Enter was pressed on a model."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(cursor_type="row", cell_padding=0, id=id)
        self._entries: list[Entry] = []
        self._selected: frozenset[Path] = frozenset()
        self._needle = ""
        self._sorted: int | None = None  # column; None: pipeline order
        self._descending = False
        self._text_cache: dict[Path, tuple[Entry, list[str]]] = {}  # path → entry, its texts
        self._headers: dict[str, str] | None = None  # column key → padded label, as drawn
        self._drawn_cells: dict[str, list[Cell]] = {}  # path → cells of its row, as drawn

    @property
    def pointed(self) -> Path | None:
        """The model under the cursor."""
        if not self.is_valid_row_index(self.cursor_row):
            return None
        return Path(str(self.ordered_rows[self.cursor_row].key.value))

    def show(self, entries: Sequence[Entry], selected: Sequence[Path]) -> None:
        self._entries, self._selected = list(entries), frozenset(selected)
        self._draw()

    def filter(self, needle: str) -> None:
        """Show only models with `needle` in any column, hidden ones included."""
        self._needle = needle.casefold()
        self._draw()

    def sort_next(self) -> None:
        """Sort by the next column; after the last, in pipeline order."""
        sortable = [None, *self._columns()]
        self._sorted = (
            sortable[(sortable.index(self._sorted) + 1) % len(sortable)] if self._sorted in sortable else None
        )
        self._descending = False
        self._draw()

    def reverse(self) -> None:
        self._descending = not self._descending
        self._draw()

    def _columns(self) -> list[int]:
        wide = self.app.size.width >= ALL_FROM
        return [index for index, column in enumerate(COLUMNS) if wide or not column.wide]

    def _rows(self) -> list[Entry]:
        rows = [e for e in self._entries if any(self._needle in text.casefold() for text in self._texts(e))]
        if self._sorted is None:
            return sorted(rows, key=lambda entry: entry.sort_key, reverse=self._descending)
        value = COLUMNS[self._sorted].value
        with_value = sorted((e for e in rows if value(e) is not None), key=value, reverse=self._descending)
        return with_value + [e for e in rows if value(e) is None]

    def _texts(self, entry: Entry) -> list[str]:
        """The texts of an entry in all COLUMNS, cached."""
        cached = self._text_cache.get(entry.model.path)
        if cached is None or cached[0] is not entry:
            cached = self._text_cache[entry.model.path] = entry, [column.text(entry) for column in COLUMNS]
        return cached[1]

    def _draw(self) -> None:
        """Update only changed cells if rows, columns and widths are the same: rebuilding the table is slow."""
        rows, columns = self._rows(), self._columns()
        grid = [[self._label(index), *(self._texts(entry)[index] for entry in rows)] for index in columns]
        gap = 1 if len(columns) == len(COLUMNS) else 2
        padded = [_pad_column(texts, COLUMNS[index].right, gap) for index, texts in zip(columns, grid, strict=True)]
        headers = {str(index): texts[0] for index, texts in zip(columns, padded, strict=True)}
        cells = {
            str(entry.model.path): self._cells(entry, [texts[number] for texts in padded])
            for number, entry in enumerate(rows, 1)
        }
        if self._headers == headers and list(self._drawn_cells) == list(cells):
            for path, row in cells.items():
                for column, before, now in zip((MARK, *headers), self._drawn_cells[path], row, strict=True):
                    if before != now:
                        self.update_cell(path, column, Text(*now))
            self._drawn_cells = cells
        else:
            self._rebuild(headers, cells)

    def _rebuild(self, headers: dict[str, str], cells: dict[str, list[Cell]]) -> None:
        self._headers, self._drawn_cells, pointed, row = headers, cells, self.pointed, self.cursor_row
        self.clear(columns=True)
        self.add_column("", width=2, key=MARK)
        for key, text in headers.items():
            self.add_column(Text(text), key=key)
        for path, texts in cells.items():
            self.add_row(*(Text(*cell) for cell in texts), key=path)
        paths = list(cells)
        self.move_cursor(
            row=paths.index(str(pointed)) if str(pointed) in cells else min(row, len(paths) - 1), animate=False
        )
        self.post_message(self.Pointed(self.pointed))

    def _label(self, index: int) -> str:
        sign = "" if self._sorted != index else "▼" if self._descending else "▲"
        return COLUMNS[index].label + sign

    def _cells(self, entry: Entry, texts: Sequence[str]) -> list[Cell]:
        style = {REFUSED: "red", CHECKING: "dim"}.get(state(entry), "")
        mark = ("●" if entry.model.path in self._selected else " ", "bold")
        return [mark, *((text, style) for text in texts)]

    def on_resize(self, _: Resize) -> None:
        self._draw()

    def on_data_table_row_highlighted(self, event: DataTable.RowHighlighted) -> None:
        event.stop()
        self.post_message(self.Pointed(self.pointed))

    def on_data_table_header_selected(self, event: DataTable.HeaderSelected) -> None:
        event.stop()
        if event.column_key.value in (None, MARK):
            return
        index = int(event.column_key.value)
        self._descending = not self._descending if index == self._sorted else False
        self._sorted = index
        self._draw()

    def on_click(self, event: Click) -> None:
        row, column = event.style.meta.get("row", -1), event.style.meta.get("column", -1)
        if row >= 0 and column == 0:
            self.post_message(self.Marked(Path(str(self.ordered_rows[row].key.value))))

    def action_choose(self) -> None:
        self.post_message(self.Chosen())
