"""The table of models, and the details of the one under the cursor."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.coordinate import Coordinate
from textual.events import Click, Resize
from textual.message import Message
from textual.widgets import DataTable, Static

from pipeline.files.text import natural_sort_key
from pipeline.inference.catalog import REFUSED, UNBOUND, VERIFIED
from tui.screens.base import WIDE
from tui.services.model_library import CHECKING, Entry
from tui.widgets.text import levels

SIGNS = {VERIFIED: "✓", UNBOUND: "?", REFUSED: "✗", CHECKING: " "}
STATE_STYLES = {REFUSED: "red", CHECKING: "dim"}
HASH_LENGTH = 12  # characters of a sha256


def short_targets(targets: Sequence[str]) -> str:
    return " ".join(target.removesuffix("_proj").removesuffix(" tokens") for target in targets) or "–"


def _format_number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _format_size(size: int) -> str:
    """The size in decimal units."""
    for unit, name, form in ((1e9, "GB", ".2f"), (1e6, "MB", ".1f"), (1e3, "kB", ".0f")):
        if size >= unit:
            return f"{size / unit:{form}} {name}"
    return f"{size} B"


def _format_time(when: float | None) -> str:
    return "–" if when is None else f"{datetime.fromtimestamp(when):%d %b %H:%M}"


def _forgetting(entry: Entry) -> float | None:
    return entry.verdict.forgetting if entry.verdict else None


@dataclass(frozen=True)
class Column:
    """A column: the text of a model, and the value to sort by (None: unknown, sorted last)."""

    label: str
    text: Callable[[Entry], str]
    value: Callable[[Entry], Any]
    right: bool = False
    wide: bool = False  # shown on wide terminals only; the filter searches it anyway


COLUMNS = (
    Column("name", lambda e: e.label, lambda e: natural_sort_key(e.label)),
    Column("kind", lambda e: e.model.kind, lambda e: e.model.kind, wide=True),
    Column("method", lambda e: e.model.method.removesuffix("_tuning"), lambda e: e.model.method),
    Column("rank", lambda e: _format_number(e.model.rank, "d"), lambda e: e.model.rank, right=True),
    Column("targets", lambda e: short_targets(e.model.targets), lambda e: e.model.targets or None, wide=True),
    Column("base", lambda e: Path(e.model.base or "–").name, lambda e: e.model.base, wide=True),
    Column("params", lambda e: _format_number(e.model.parameters, ",d"), lambda e: e.model.parameters, True, True),
    Column("size", lambda e: _format_size(e.model.size), lambda e: e.model.size, right=True, wide=True),
    Column("loss", lambda e: _format_number(e.model.final_loss, ".3f"), lambda e: e.model.final_loss, right=True),
    Column("forgot", lambda e: _format_number(_forgetting(e), "+.3f"), _forgetting, right=True),
    Column("when", lambda e: _format_time(e.model.when), lambda e: e.model.when, wide=True),
    Column("state", lambda e: f"{SIGNS[e.state]} {e.state}{e.gate}", lambda e: e.state + e.gate),
)


class ModelTable(DataTable[Text]):
    """The models in the order of the pipeline, or by any column; a column of marks comes first.

    The table never changes marks itself: it posts `Marked` when one is clicked, and the screen calls `show` again.
    """

    DEFAULT_CSS = "ModelTable { height: 1fr; }"
    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "screen.prompt", "Choose the row", show=False)]

    @dataclass
    class Marked(Message):
        """The mark of a model was clicked."""

        path: Path

    def __init__(self) -> None:
        super().__init__(cursor_type="row", cell_padding=0)
        self._entries: Sequence[Entry] = ()
        self._texts: dict[Path, dict[str, str]] = {}  # of each model by column; the filter searches hidden ones too
        self._selected: Collection[Path] = ()
        self._needle = ""
        self._sort_column: Column | None = None
        self._descending = False
        # What is drawn now. The grid has the header in its first line, and marks in its first column.
        self._drawn_rows: list[Entry] = []
        self._grid: list[list[tuple[str, str]]] = []  # text and style

    @property
    def pointed(self) -> Entry | None:
        """The model under the cursor."""
        return self._drawn_rows[self.cursor_row] if 0 <= self.cursor_row < len(self._drawn_rows) else None

    @property
    def path(self) -> Path | None:
        """The path of the model under the cursor."""
        return self.pointed.model.path if self.pointed else None

    def show(self, entries: Sequence[Entry], selected: Collection[Path]) -> None:
        """Replace all models and the selected ones, which are marked."""
        self._entries, self._selected = entries, frozenset(selected)
        self._texts = {entry.model.path: {c.label: c.text(entry) for c in COLUMNS} for entry in entries}
        self._draw()

    def filter(self, needle: str) -> None:
        """Show only models with `needle` in any column, hidden ones included; upper and lower case are the same."""
        self._needle = needle.casefold()
        self._draw()

    def sort_next(self) -> None:
        """Sort by the next column shown; after the last, in the pipeline's order."""
        choices = [None, *self._columns_shown()]
        index = choices.index(self._sort_column) + 1 if self._sort_column in choices else 0
        self._sort_column, self._descending = choices[index % len(choices)], False
        self._draw()

    def reverse(self) -> None:
        """Sort the other way."""
        self._descending = not self._descending
        self._draw()

    def _columns_shown(self) -> list[Column]:
        return [column for column in COLUMNS if self.app.size.width >= WIDE or not column.wide]

    def _rows_shown(self) -> list[Entry]:
        """The models with the filter's text, sorted; those without a value last in both directions."""
        texts = {path: "\n".join(cells.values()).casefold() for path, cells in self._texts.items()}
        rows = [entry for entry in self._entries if self._needle in texts[entry.model.path]]
        value = self._sort_column.value if self._sort_column else lambda entry: entry.sort_key
        known = [row for row in rows if value(row) is not None]
        return sorted(known, key=value, reverse=self._descending) + [row for row in rows if value(row) is None]

    def _draw(self) -> None:
        """Update only the cells that changed if rows, columns and widths are the same: rebuilding the table is slow."""
        rows, columns = self._rows_shown(), self._columns_shown()
        grid: list[list[tuple[str, str]]] = [[("", "")]]
        grid += [[("●" if row.model.path in self._selected else " ", "bold")] for row in rows]
        gap = " " if len(columns) == len(COLUMNS) else "  "
        styles = ["", *(STATE_STYLES.get(row.state, "") for row in rows)]
        for column in columns:
            sign = "" if column is not self._sort_column else "▼" if self._descending else "▲"
            texts = [column.label + sign, *(self._texts[row.model.path][column.label] for row in rows)]
            width = max(map(len, texts))
            for line, text, style in zip(grid, texts, styles, strict=True):
                line.append(((text.rjust(width) if column.right else text.ljust(width)) + gap, style))
        pointed, index = self.path, self.cursor_row
        paths = [row.model.path for row in rows]
        unchanged = self._grid and self._grid[0] == grid[0] and [row.model.path for row in self._drawn_rows] == paths
        before, self._grid, self._drawn_rows = self._grid, grid, rows
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
        row = paths.index(pointed) if pointed in paths else min(index, len(paths) - 1)
        self.move_cursor(row=row, animate=False)

    def on_resize(self, _: Resize) -> None:
        self._draw()

    def on_data_table_header_selected(self, event: DataTable.HeaderSelected) -> None:
        event.stop()
        if event.column_index > 0:  # not the marks
            column = self._columns_shown()[event.column_index - 1]
            self._descending = not self._descending if column is self._sort_column else False
            self._sort_column = column
            self._draw()

    def on_click(self, event: Click) -> None:
        row, column = event.style.meta.get("row", -1), event.style.meta.get("column", -1)
        if row >= 0 and column == 0:
            self.post_message(self.Marked(self._drawn_rows[row].model.path))


@dataclass
class Details:
    """A model's manifest and config, and its spectra: None until measured, a string if that is not possible."""

    entry: Entry
    manifest: Mapping[str, Any]
    config: Mapping[str, Any]
    spectrum: Sequence[Mapping[str, Any]] | str | None = None


class ModelDetails(VerticalScroll):
    """Shows the details of a model; empty without one."""

    DEFAULT_CSS = "ModelDetails { padding: 0 1; } ModelDetails:focus { background: $boost; }"

    def compose(self) -> ComposeResult:
        yield Static()

    def show(self, details: Details | None) -> None:
        self.query_one(Static).update(format_details(details) if details else "")


def format_details(details: Details) -> Text:
    """The details as lines of `key value` in sections."""
    entry, manifest = details.entry, details.manifest
    style = "not bold red" if entry.state == REFUSED else "not bold"
    text = Text(f"{entry.label}  ", "bold")
    text.append(f"{entry.model.kind} · {entry.model.method} · ", "not bold").append(
        f"{entry.state}{entry.gate}\n", style
    )
    if entry.verdict and entry.verdict.reason:
        text.append(f"{entry.verdict.reason}\n", style)
    text.append(f"{entry.shown_path}\n", "not bold dim")
    if entry.model.scales:
        text.append_text(format_spectrum(details.spectrum))
    sections: dict[str, dict[str, str]] = {}
    if entry.model.kind == "adapter":
        unset: Sequence[Any] = (None, False, {}, [], "none")
        sections["adapter"] = _flatten({key: value for key, value in details.config.items() if value not in unset})
    commit = {"commit": str(manifest["commit"])[:HASH_LENGTH]} if manifest.get("commit") else {}
    sections["manifest"] = commit | _flatten(manifest.get("parameters"), "parameters ")
    sections["params"] = _flatten(manifest.get("params"))
    for name in ("inputs", "base", "fingerprint"):
        sections[name] = {key: value[:HASH_LENGTH] for key, value in _flatten(manifest.get(name)).items()}
    sections["versions"] = _flatten(manifest.get("versions"))
    for title, pairs in sections.items():
        if pairs:
            width = max(map(len, pairs)) + 1
            lines = [f"  {key.ljust(width)}{value}\n" for key, value in pairs.items()]
            text.append_text(Text.assemble((f"{title}\n", "bold"), *lines))
    return text


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """The items of a mapping as texts; of anything else, which a file of another tool may have there, none."""
    items = value.items() if isinstance(value, dict) else ()
    return {f"{prefix}{k}": " ".join(map(str, v)) if isinstance(v, list) else str(v) for k, v in items}


def format_spectrum(spectrum: Sequence[Mapping[str, Any]] | str | None) -> Text:
    """A line per module: sparkline of the singular values, the largest, and its share of ‖ΔW‖²."""
    text = Text("spectrum of ΔW", "bold")
    if spectrum is None or isinstance(spectrum, str):
        return text.append(f"  {spectrum or 'm measures it'}\n", "not bold dim")
    text.append("  singular values, largest first\n", "not bold dim")
    names = [short_module(module["name"]) for module in spectrum]
    width = max(map(len, names), default=0) + 1
    for name, module in zip(names, spectrum, strict=True):
        values = list(map(float, module["values"]))
        total = sum(value * value for value in values)  # the squared Frobenius norm of ΔW
        largest = f"{values[0]:.3g}" if values else "–"
        share = f"{100 * values[0] ** 2 / total:.0f}%" if total else "–"
        text.append(f"  {name.ljust(width)}{levels(values)} {largest}  first {share}\n", "not bold")
    return text


def short_module(name: str) -> str:
    """model.decoder.layers.0.self_attn.q_proj → 0.q_proj"""
    parts = name.split(".")
    return ".".join([*(part for part in parts[:-1] if part.isdigit()), parts[-1]])
