"""The list of models: the pipeline's own, then folders to unfold. Only the lines that are visible
are drawn.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import ClassVar, NamedTuple

from rich.style import Style
from rich.text import Text
from textual.binding import Binding, BindingType
from textual.color import Color
from textual.events import Click, Resize
from textual.geometry import Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from pipeline.views.model_library import Entry
from pipeline.views.models import REFUSED
from tui.screens.models.columns import (
    BY_LABEL,
    Column,
    columns_for,
    look_name,
    name_width,
    pad,
    searched,
    sorted_entries,
)
from tui.widgets.colors import method_look, method_style
from tui.widgets.table import MOVE_KEYS
from tui.widgets.text import pad_or_truncate

_order = attrgetter("sort_key")
FEW = 8  # models of a folder that is unfolded at first
MARKS = 4  # cells before the name: chosen or not, the sign of the method
HEADER = 1  # lines


class Folder(NamedTuple):
    """A line that folds the models below it. `best`: the largest share of old answers that one of
    them keeps.
    """

    name: str
    models: int
    measured: int
    best: float | None


Line = Entry | Folder


class ModelTable(ScrollView, can_focus=True):
    """A header and a line per model or folder. Sorted by a column, or filtered, it has all models
    and no folders.

    The table never changes what is chosen: it posts `Chosen`, and the screen calls `show` again.
    """

    COMPONENT_CLASSES: ClassVar[set[str]] = {"table--cursor", "table--header", "table--folder"}
    DEFAULT_CSS = """
    ModelTable {
        height: 1fr; background: transparent; overflow-x: hidden; scrollbar-size-vertical: 1;
        & > .table--header { color: $text-muted; text-style: bold; }
        & > .table--folder { color: $text; text-style: bold; }
        & > .table--cursor { background: $boost; }
        &:focus > .table--cursor { background: $block-cursor-background; color: $block-cursor-foreground; }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        *MOVE_KEYS,
        Binding("enter", "act", "ask, unfold"),
        Binding("right", "fold(False)", "Unfold the folder", show=False),
        Binding("left", "fold(True)", "Fold the folder", show=False),
        Binding("space", "choose", "choose"),
    ]

    @dataclass
    class Chosen(Message):
        """Models are to be marked, or no longer: one, or all of a folder."""

        paths: Sequence[Path]

    @dataclass
    class Opened(Message):
        """Enter on a model."""

        entry: Entry

    class Pointed(Message):
        """The cursor came to another line, or what the line shows changed."""

    def __init__(self) -> None:
        super().__init__()
        self._entries: Sequence[Entry] = ()
        self._chosen: Collection[Path] = frozenset()
        self._busy: Collection[Path] = frozenset()  # being evaluated
        self._searched: dict[int, str] = {}  # by id of the entry: it is made once for each
        self._needle = ""
        self.sort_column: Column | None = None
        self.reverse = False
        self._folds: dict[str, bool] = {}  # folder → whether it is folded, if the user said so
        self._lines: Sequence[Line] = ()
        self._columns: Sequence[Column] = ()
        self._name_width = 0
        self._row = 0

    # What is shown

    @property
    def pointed(self) -> Entry | None:
        """The model under the cursor."""
        line = self._line
        return line if isinstance(line, Entry) else None

    @property
    def pointed_entries(self) -> list[Entry]:
        """The model under the cursor, or the models of the folder under it."""
        line = self._line
        if isinstance(line, Folder):
            return [entry for entry in self._entries if entry.group == line.name]
        return [line] if line else []

    @property
    def _line(self) -> Line | None:
        return self._lines[self._row] if self._row < len(self._lines) else None

    @property
    def row_count(self) -> int:
        return len(self._lines)

    def visible_paths(self) -> list[Path]:
        """The models whose lines can be seen now, or would be first."""
        top = round(self.scroll_offset.y)
        lines = self._lines[top : top + max(self.size.height, 20)]
        return [line.model.path for line in lines if isinstance(line, Entry)]

    def texts(self) -> list[str]:
        """Every line as it is drawn: for copies and tests."""
        return [self._draw(line).plain for line in self._lines]

    def show(
        self,
        entries: Sequence[Entry],
        chosen: Collection[Path] | None = None,
        busy: Collection[Path] | None = None,
    ) -> None:
        """Show these models; `chosen` are marked, and `busy` are being evaluated."""
        self._entries = entries
        if chosen is not None:
            self._chosen = frozenset(chosen)
        if busy is not None:
            self._busy = frozenset(busy)
        self._arrange()

    def filter(self, needle: str) -> None:
        """Show only models with `needle` in any column, hidden ones included; upper and lower case
        are the same.
        """
        self._needle = needle.casefold()
        self._arrange()

    def sort(self, column: Column | None) -> None:
        """Sort by a column; the same one again turns it around. None: the pipeline's order."""
        self.reverse = not self.reverse if column and column is self.sort_column else False
        self.sort_column = column
        self._arrange()

    def sort_beside(self, by: int) -> None:
        """Sort by the next column that is shown, or the one before; beyond the last, in the
        pipeline's order.
        """
        choices = [*self._columns, None]
        if self.sort_column and self.sort_column in choices:
            start = choices.index(self.sort_column)
        else:  # the first press answers what is asked most
            start = choices.index(BY_LABEL["kept"]) - by if BY_LABEL["kept"] in choices else -1
        self.sort_column, self.reverse = choices[(start + by) % len(choices)], False
        self._arrange()

    def point(self, path: Path) -> bool:
        """Move the cursor to a model, and unfold its folder. False if it is not listed."""
        entry = next((entry for entry in self._entries if entry.model.path == path), None)
        if entry is None:
            return False
        if entry.group and not self._is_flat:
            self._folds[entry.group] = False
        self._arrange()
        rows = [
            row
            for row, line in enumerate(self._lines)
            if isinstance(line, Entry) and line.model.path == path
        ]
        if rows:
            self._go_to(rows[0])
        return bool(rows)

    @property
    def _is_flat(self) -> bool:
        return bool(self._needle) or self.sort_column is not None

    def _arrange(self) -> None:
        """Compute the lines again; the cursor stays on its model or folder."""
        before, key = self._line, _key(self._line)
        self._lines = list(self._lines_now())
        width = self.scrollable_content_region.width - MARKS
        self._name_width = name_width(self._entries, width)
        self._columns = columns_for(width, self._name_width)
        keys = (row for row, line in enumerate(self._lines) if _key(line) == key)
        self._row = next(keys, min(self._row, max(len(self._lines) - 1, 0)))
        self.virtual_size = Size(width + MARKS, len(self._lines) + HEADER)
        self.refresh()
        if self._line is not before:
            self._follow_cursor()
            self.post_message(self.Pointed())

    def _lines_now(self) -> Iterator[Line]:
        if self._is_flat:
            found = [
                entry
                for entry in self._entries
                if not self._needle or self._needle in self._text_of(entry)
            ]
            column = self.sort_column
            yield from (
                sorted_entries(found, column, self.reverse) if column else sorted(found, key=_order)
            )
            return
        groups: dict[str, list[Entry]] = {}
        for entry in sorted(self._entries, key=_order):
            groups.setdefault(entry.group, []).append(entry)
        for name, entries in groups.items():
            if name:
                kept = [
                    entry.verdict.kept
                    for entry in entries
                    if entry.verdict and entry.verdict.kept is not None
                ]
                yield Folder(name, len(entries), len(kept), max(kept, default=None))
            if not name or not self._is_folded(name, len(entries)):
                yield from entries

    def _is_folded(self, name: str, count: int) -> bool:
        return self._folds.get(name, count > FEW)

    def _text_of(self, entry: Entry) -> str:
        key = id(entry)
        if key not in self._searched:
            if len(self._searched) > 2 * len(self._entries):
                self._searched.clear()  # of entries that are gone
            self._searched[key] = searched(entry)
        return self._searched[key]

    # How it is drawn

    def on_resize(self, _: Resize) -> None:
        self._arrange()
        self._follow_cursor()

    def render_line(self, y: int) -> Strip:
        width, row = self.size.width, y - HEADER + self.scroll_offset.y
        if y < HEADER:
            return self._strip(self._header(), self.get_component_rich_style("table--header"))
        if row >= len(self._lines):
            return Strip.blank(width, self.rich_style)
        line = self._lines[row]
        kind = "table--folder" if isinstance(line, Folder) else ""
        style = (
            self.get_component_rich_style("table--cursor" if row == self._row else kind)
            if kind or row == self._row
            else None
        )
        return self._strip(self._draw(line, cursor=row == self._row and self.has_focus), style)

    def _strip(self, text: Text, style: Style | None) -> Strip:
        strip = Strip(text.render(self.app.console)).adjust_cell_length(self.size.width)
        return strip.apply_style(self.rich_style + style if style else self.rich_style)

    def _header(self) -> Text:
        line = Text(" " * MARKS, end="")
        for column in self._columns if self._lines else ():
            label = column.label
            if column is self.sort_column:
                # ▲ as in every table: the smallest is on top
                label = (label if column.width != 1 else "") + (
                    "▼" if column.falls != self.reverse else "▲"
                )
            line.append_text(
                pad(Text(label), column.width or self._name_width, column.right)
            ).append(" ")
        return line

    def _draw(self, line: Line, cursor: bool = False) -> Text:
        if isinstance(line, Folder):
            sign = "▸" if self._is_folded(line.name, line.models) else "▾"
            text = Text(
                f"{sign} {pad_or_truncate(line.name, min(len(line.name), self.size.width // 2))} "
                f"({line.models})",
                end="",
            )
            best = "" if line.best is None else f"  best keeps {line.best:.0%}"
            rest = line.models - line.measured
            return text.append(
                f"{best}{f'  {rest} not evaluated' if rest else ''}",
                "not bold dim" if not cursor else "not bold",
            )
        chosen = line.model.path in self._chosen
        look, name = method_look(look_name(line)), look_name(line)
        colors = self.app.theme_variables
        background = (
            Color.parse(colors["block-cursor-background"]) if cursor else self.background_colors[1]
        )
        color = method_style(name, background)
        text = Text("● " if chosen else "  ", "bold", end="").append(f"{look.sign} ", color)
        for column in self._columns:
            if column.width == 0:
                indent = "  " * bool(line.group and not self._is_flat)
                label = line.label.removeprefix(f"{line.group}/") if indent else line.label
                cell = Text(indent + label, "dim" if line.state == REFUSED and not cursor else "")
            elif column.label in ("learned", "kept") and line.model.path in self._busy:
                cell = Text("measuring…")
            else:
                cell = column.cell(line, colors)
            text.append_text(pad(cell, column.width or self._name_width, column.right)).append(" ")
        return text

    # Keys and the mouse

    def _go_to(self, row: int) -> None:
        row = min(max(row, 0), max(len(self._lines) - 1, 0))
        if row != self._row:
            self.refresh_lines(self._row + HEADER)
            self._row = row
            self.refresh_lines(row + HEADER)
            self._follow_cursor()
            self.post_message(self.Pointed())

    def _follow_cursor(self) -> None:
        height = self.size.height - HEADER
        if height > 0:
            top = round(self.scroll_offset.y)
            wanted = min(max(top, self._row - height + 1), self._row)
            if wanted != top:
                self.scroll_to(y=wanted, animate=False, force=True)

    def action_move(self, by: int) -> None:
        self._go_to(self._row + by)

    def action_page(self, by: int) -> None:
        self._go_to(self._row + by * max(self.size.height - HEADER - 1, 1))

    def action_act(self) -> None:
        line = self._line
        if isinstance(line, Folder):
            self._fold(line.name, not self._is_folded(line.name, line.models))
        elif line:
            self.post_message(self.Opened(line))

    def action_fold(self, folded: bool) -> None:
        """Fold or unfold the folder of the line; left on one of its models folds it too."""
        line = self._line
        name = line.name if isinstance(line, Folder) else line.group if line else ""
        if name and not self._is_flat:
            self._fold(name, folded)

    def _fold(self, name: str, folded: bool) -> None:
        self._folds[name] = folded
        self._row = next((r for r, line in enumerate(self._lines) if _key(line) == name), self._row)
        self._arrange()

    def action_choose(self) -> None:
        if entries := self.pointed_entries:
            self.post_message(self.Chosen([entry.model.path for entry in entries]))

    def on_click(self, event: Click) -> None:
        row = event.y - HEADER + round(self.scroll_offset.y)
        if event.y < HEADER:
            if column := self._column_at(event.x):
                self.sort(column)
        elif row < len(self._lines):
            again = row == self._row
            self._go_to(row)
            line = self._lines[row]
            if isinstance(line, Folder):
                self.action_act()
            elif event.x < 2:
                self.action_choose()
            elif again and event.chain == 2:
                self.action_act()

    def _column_at(self, x: int) -> Column | None:
        stop = MARKS
        for column in self._columns:
            stop += (column.width or self._name_width) + 1
            if x < stop:
                return column
        return None

    def watch_has_focus(self, focused: bool) -> None:
        super().watch_has_focus(focused)
        self.refresh()


def _key(line: Line | None) -> object:
    """What stays the same when a line is drawn anew."""
    return line.name if isinstance(line, Folder) else line.model.path if line else None


def sort_choices(current: Column | None, reverse: bool) -> dict[str, str]:
    """The lines of the sort menu, by label."""
    choices = {"": "pipeline's order, folders folded"}
    for label, column in BY_LABEL.items():
        if column.width == 1:  # the same as another, in short
            continue
        falls = column.falls != (reverse if column is current else False)
        choices[label] = f"{label} {'▼' if falls else '▲'}" + (
            "  (again: the other way)" if column is current else ""
        )
    return choices
