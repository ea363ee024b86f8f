"""The models that were found, a row each: sorted by any column, filtered, some of them selected."""

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
ALL_FROM = 110  # columns of the terminal from which all are shown
MARK = "mark"  # the column's key
Cell = tuple[str, str]  # text and style


@dataclass(frozen=True)
class Column:
    """What a column says of a model, and the value that it is sorted by (None: not known, last)."""

    label: str
    text: Callable[[Entry], str]
    value: Callable[[Entry], Any]
    right: bool = False
    wide: bool = False  # only shown where there is room


def state(entry: Entry) -> str:
    return entry.verdict.state if entry.verdict else CHECKING


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _size(entry: Entry) -> str:
    """In decimal units, as files are listed."""
    for unit, name, form in ((1e9, "GB", ".2f"), (1e6, "MB", ".1f"), (1e3, "kB", ".0f")):
        if entry.model.size >= unit:
            return f"{entry.model.size / unit:{form}} {name}"
    return f"{entry.model.size} B"


def short_targets(targets: Sequence[str]) -> str:
    return " ".join(target.removesuffix("_proj").removesuffix(" tokens") for target in targets) or "–"


def _forgetting(entry: Entry) -> float | None:
    return entry.verdict.forgetting if entry.verdict else None


def _when(entry: Entry) -> str:
    when = entry.model.when
    return "–" if when is None else f"{datetime.fromtimestamp(when):%d %b %H:%M}"


COLUMNS = (
    Column("name", lambda e: e.label, lambda e: natural_sort_key(e.label)),
    Column("kind", lambda e: e.model.kind, lambda e: e.model.kind, wide=True),
    Column("method", lambda e: e.model.method.removesuffix("_tuning"), lambda e: e.model.method),
    Column("rank", lambda e: _number(e.model.rank, "d"), lambda e: e.model.rank, right=True),
    Column("targets", lambda e: short_targets(e.model.targets), lambda e: e.model.targets or None, wide=True),
    Column("base", lambda e: Path(e.model.base or "–").name, lambda e: e.model.base, wide=True),
    Column("params", lambda e: _number(e.model.parameters, ",d"), lambda e: e.model.parameters, right=True, wide=True),
    Column("size", _size, lambda e: e.model.size, right=True, wide=True),
    Column("loss", lambda e: _number(e.model.final_loss, ".3f"), lambda e: e.model.final_loss, right=True),
    Column("forgot", lambda e: _number(_forgetting(e), "+.3f"), _forgetting, right=True),
    Column("when", _when, lambda e: e.model.when, wide=True),
    Column("state", lambda e: f"{SIGNS[state(e)]} {state(e)}", state),
)


def _padded(texts: Sequence[str], right: bool, gap: int) -> list[str]:
    """All as wide as the widest, and a gap after them."""
    width = max(map(len, texts))
    return [(text.rjust(width) if right else text.ljust(width)) + " " * gap for text in texts]


class ModelTable(DataTable[Text]):
    """Says which model the cursor is on, which is marked, and which was chosen with Enter."""

    DEFAULT_CSS = "ModelTable { height: 1fr; }"
    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "choose", "Prompt it", show=False)]

    class Pointed(Message):
        """The cursor is on another model, or on none."""

        def __init__(self, path: Path | None) -> None:
            super().__init__()
            self.path = path

    class Marked(Message):
        """A model was clicked on its mark."""

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
        self._sorted: int | None = None  # column; None is the order of the pipeline
        self._descending = False
        self._said: dict[Path, tuple[Entry, list[str]]] = {}  # an entry's texts, as long as it is the same
        self._heads: dict[str, str] | None = None  # a column's key → its padded label, as drawn
        self._drawn: dict[str, list[Cell]] = {}  # a row's path → its cells, as drawn

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
        """Show only models with `needle` in one of their columns, those not shown included."""
        self._needle = needle.casefold()
        self._draw()

    def sort_next(self) -> None:
        """By the next column, and after the last in the order of the pipeline again."""
        shown = [None, *self._columns()]
        self._sorted = shown[(shown.index(self._sorted) + 1) % len(shown)] if self._sorted in shown else None
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
            return sorted(rows, key=lambda entry: entry.place, reverse=self._descending)
        value = COLUMNS[self._sorted].value
        known = sorted((e for e in rows if value(e) is not None), key=value, reverse=self._descending)
        return known + [e for e in rows if value(e) is None]

    def _texts(self, entry: Entry) -> list[str]:
        """What each of COLUMNS says of it."""
        known = self._said.get(entry.model.path)
        if known is None or known[0] is not entry:
            known = self._said[entry.model.path] = entry, [column.text(entry) for column in COLUMNS]
        return known[1]

    def _draw(self) -> None:
        """Only the cells that changed, where rows, columns and widths stay: a whole table takes long to build."""
        rows, columns = self._rows(), self._columns()
        grid = [[self._label(index), *(self._texts(entry)[index] for entry in rows)] for index in columns]
        gap = 1 if len(columns) == len(COLUMNS) else 2
        padded = [_padded(texts, COLUMNS[index].right, gap) for index, texts in zip(columns, grid, strict=True)]
        heads = {str(index): texts[0] for index, texts in zip(columns, padded, strict=True)}
        cells = {
            str(entry.model.path): self._cells(entry, [texts[number] for texts in padded])
            for number, entry in enumerate(rows, 1)
        }
        if self._heads == heads and list(self._drawn) == list(cells):
            for path, row in cells.items():
                for column, before, now in zip((MARK, *heads), self._drawn[path], row, strict=True):
                    if before != now:
                        self.update_cell(path, column, Text(*now))
            self._drawn = cells
        else:
            self._rebuild(heads, cells)

    def _rebuild(self, heads: dict[str, str], cells: dict[str, list[Cell]]) -> None:
        self._heads, self._drawn, at, row = heads, cells, self.pointed, self.cursor_row
        self.clear(columns=True)
        self.add_column("", width=2, key=MARK)
        for key, text in heads.items():
            self.add_column(Text(text), key=key)
        for path, texts in cells.items():
            self.add_row(*(Text(*cell) for cell in texts), key=path)
        paths = list(cells)
        self.move_cursor(row=paths.index(str(at)) if str(at) in cells else min(row, len(paths) - 1), animate=False)
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
