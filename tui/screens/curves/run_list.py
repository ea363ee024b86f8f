"""The list of runs: shown or hidden, symbol, colour and status of each."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from rich.text import Text
from textual.binding import Binding, BindingType
from textual.color import Color
from textual.message import Message
from textual.widgets import OptionList

from tui.screens.curves.runs import Runs
from tui.widgets.keyed_list import KeyedList
from tui.widgets.line_chart import readable

INDENT = 6
OPENS = "enter lists them"
MAX_NAME = 44  # characters of an adapter's name in the list, at most


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


def list_rows(runs: Runs, expanded: Collection[str]) -> Iterator[Row]:
    """A row per run, and below an expanded sweep a row per adapter, the names padded to one width."""
    for key, view in runs.views.items():
        on, look = key in runs.shown, runs.looks[key]
        opened = key in expanded if view.run.sweeps else None
        # A hidden run is not read, so its numbers would be old.
        yield Row(key, on, look.sign, look.color, view.run.label, view.facts() if on else [view.state], opened)
        if opened:
            width = min(max(map(len, view.curve_logs)), MAX_NAME)
            for name, log in view.curve_logs.items():
                label = name if len(name) <= width else f"{name[: width - 1]}…"
                sign = look.sign if log is view.best else " "
                facts = view.facts_of(log)
                yield Row(view.adapter_key(log), on, sign, look.color, f"{label:{width}}", facts, sweep=key)


class RunList(KeyedList):
    """Legend, status and switches of the runs."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space", "select", "Show or hide the run", id="curves.toggle", show=False),
        Binding("enter", "open", "Show or hide the run; list a sweep's adapters", id="curves.open", show=False),
    ]
    DEFAULT_CSS = """
    RunList { scrollbar-size-vertical: 1; background: $background; }
    RunList:focus { background: $background; }
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

        row: Row

    def __init__(self) -> None:
        super().__init__()
        self._rows: dict[str, Row] = {}

    @property
    def pointed(self) -> Row | None:
        """The highlighted row."""
        option = self.highlighted_option
        return self._rows.get(str(option.id)) if option is not None else None

    def show_rows(self, rows: Iterator[Row]) -> None:
        """Show these rows. The highlight of an adapter that is no longer listed moves to its sweep."""
        pointed = self.pointed
        self._rows = {row.key: row for row in rows}
        self.show({key: self._format_row(row) for key, row in self._rows.items()}, pointed.sweep if pointed else "")

    def on_resize(self) -> None:
        """Wrap the lines again."""
        self.show({key: self._format_row(row) for key, row in self._rows.items()})

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Toggle the run; for an adapter, its whole sweep."""
        event.stop()
        row = self._rows[str(event.option_id)]
        self.post_message(self.Toggled(row.sweep or row.key))

    def on_option_list_option_highlighted(self, event: OptionList.OptionHighlighted) -> None:
        event.stop()
        if row := self._rows.get(str(event.option_id)):
            self.post_message(self.Pointed(row))

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
