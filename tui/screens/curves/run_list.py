"""The list of runs: shown or hidden, symbol, colour and status of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rich.text import Text
from textual.binding import Binding, BindingType
from textual.color import Color
from textual.message import Message
from textual.widgets import OptionList
from textual.widgets.option_list import Option

from tui.widgets.contrast import readable

INDENT = 6
OPENS = "enter lists them"


@dataclass(frozen=True)
class Row:
    """A run, or an adapter of a sweep. `on`: whether it is drawn. `facts` may wrap to several lines.

    `expanded`: whether a sweep's adapters are listed (None: not a sweep). Their rows have the sweep's key in `sweep`.
    """

    key: str
    on: bool
    sign: str
    color: str
    label: str
    facts: Sequence[str] = ()
    expanded: bool | None = None
    sweep: str = ""


class RunList(OptionList):
    """Legend, status and switches of the runs."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space", "select", "Show or hide the run", id="curves.toggle", show=False),
        Binding("enter", "open", "Show or hide the run; list a sweep's adapters", id="curves.open", show=False),
    ]
    DEFAULT_CSS = """
    RunList { height: auto; scrollbar-size-vertical: 1; border: none; padding: 0; background: $background; }
    RunList:focus { border: none; background: $background; }
    """

    @dataclass
    class Toggled(Message):
        """Show or hide the run with this key."""

        key: str

    @dataclass
    class Opened(Message):
        """Expand or collapse the sweep with this key."""

        key: str

    @dataclass
    class Pointed(Message):
        """The highlight moved to this row: a run or an adapter."""

        key: str

    def __init__(self) -> None:
        super().__init__(compact=True)
        self._rows: list[Row] = []

    @property
    def pointed(self) -> Row | None:
        """The highlighted row."""
        index = self.highlighted
        return self._rows[index] if index is not None and index < len(self._rows) else None

    def show(self, rows: Sequence[Row]) -> None:
        """Show `rows`. The highlight stays on its run, or at its index if the run is gone."""
        if [row.key for row in rows] == [row.key for row in self._rows]:
            for index, (row, before) in enumerate(zip(rows, self._rows, strict=True)):
                if row != before:
                    self.replace_option_prompt_at_index(index, self._format_row(row))
        else:
            indices, pointed, index = {row.key: n for n, row in enumerate(rows)}, self.pointed, self.highlighted or 0
            if pointed is not None:
                index = indices.get(pointed.key, indices.get(pointed.sweep, index))
            self.clear_options()
            self.add_options([Option(self._format_row(row), id=row.key) for row in rows])
            self._rows = list(rows)
            self.highlighted = min(index, len(rows) - 1) if rows else None
        self._rows = list(rows)

    def on_resize(self) -> None:
        """Wrap the lines again."""
        for index, row in enumerate(self._rows):
            self.replace_option_prompt_at_index(index, self._format_row(row))

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Toggle the run; for an adapter, its whole sweep."""
        event.stop()
        row = self._rows[event.option_index]
        self.post_message(self.Toggled(row.sweep or row.key))

    def on_option_list_option_highlighted(self, event: OptionList.OptionHighlighted) -> None:
        event.stop()
        if event.option_id is not None:
            self.post_message(self.Pointed(event.option_id))

    def action_open(self) -> None:
        row = self.pointed
        if row is not None and (row.sweep or row.expanded is not None):
            self.post_message(self.Opened(row.sweep or row.key))
        else:
            self.action_select()

    def _format_row(self, row: Row) -> Text:
        color = readable(Color.parse(row.color), self.background_colors[1]).hex
        box = " " * INDENT if row.sweep else "[x] " if row.on else "[ ] "
        arrow = "" if row.expanded is None else "▾ " if row.expanded else "▸ "
        bold = "bold" if row.on and not row.sweep else ""
        first = Text.assemble(box, (row.sign, color), " ", (arrow + row.label, bold))
        facts = [*row.facts[:2], OPENS, *row.facts[2:]] if row.expanded is False else row.facts
        lines, width = [first], max(self.size.width - 1, 40)
        for fact in facts:
            if lines[-1].cell_len + 2 + len(fact) > width and lines[-1].cell_len > INDENT:
                lines.append(Text(" " * (INDENT - 2)))
            lines[-1].append(f"  {fact}", "" if len(lines) == 1 else "dim")
        return Text("\n").join(lines)
