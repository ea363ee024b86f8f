"""The list of runs: shown or hidden, symbol, colour and status of each."""

from collections.abc import Collection, Sequence
from typing import ClassVar

from rich.text import Text
from textual.binding import Binding, BindingType
from textual.color import Color

from tui.screens.curves.runs import Runs
from tui.widgets.line_chart import readable
from tui.widgets.text import KeyedList

INDENT = 6
OPENS = "enter lists them"
MAX_NAME = 44  # characters of an adapter's name in the list, at most


class RunList(KeyedList):
    """Legend, status and switches of the runs; below an expanded sweep, its adapters. Option ids are their keys."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space", "select", "Show or hide the run", id="curves.toggle", show=False),
        Binding("enter", "screen.open", "Show or hide the run; list a sweep's adapters", id="curves.open", show=False),
    ]
    DEFAULT_CSS = """
    RunList { scrollbar-size-vertical: 1; background: $background; }
    RunList:focus { background: $background; }
    """

    def __init__(self) -> None:
        super().__init__()
        self._runs: Runs | None = None
        self._expanded: Collection[str] = ()
        self.sweeps: dict[str, str] = {}  # key of a sweep or of an adapter → key of its sweep

    def show_runs(self, runs: Runs, expanded: Collection[str]) -> None:
        """A line per run, and below each expanded sweep one per adapter, the names padded to one width."""
        self._runs, self._expanded = runs, expanded
        option, sweeps, lines = self.highlighted_option, self.sweeps, dict[str, Text]()
        self.sweeps = {}
        for key, view in runs.views.items():
            on, look, label = key in runs.shown, runs.looks[key], view.run.label
            facts = view.facts() if on else [view.state]  # a hidden run is not read, so its numbers would be old
            if view.run.sweeps:
                self.sweeps[key] = key
                label = f"{'▾' if key in expanded else '▸'} {label}"
                if key not in expanded:
                    facts.insert(2, OPENS)
            lines[key] = self._line("[x] " if on else "[ ] ", look.sign, look.color, label, facts, bold=on)
            if key in self.sweeps and key in expanded:
                width = min(max(map(len, view.curve_logs)), MAX_NAME)
                for name, log in view.curve_logs.items():
                    adapter, sign = view.adapter_key(log), look.sign if log is view.best else " "
                    label = f"{name if len(name) <= width else f'{name[: width - 1]}…':{width}}"
                    self.sweeps[adapter] = key
                    lines[adapter] = self._line(" " * INDENT, sign, look.color, label, view.facts_of(log))
        # The highlight of an adapter that is no longer listed moves to its sweep.
        self.show(lines, sweeps.get(str(option.id), "") if option else "")

    def _line(self, box: str, sign: str, color: str, label: str, facts: Sequence[str], bold: bool = False) -> Text:
        """Facts that do not fit are wrapped to further lines."""
        color = readable(Color.parse(color), self.background_colors[1]).hex
        lines = [Text.assemble(box, (sign, color), " ", (label, "bold" if bold else ""))]
        width = max(self.size.width - 1, 40)
        for fact in facts:
            if lines[-1].cell_len + 2 + len(fact) > width and lines[-1].cell_len > INDENT:
                lines.append(Text(" " * (INDENT - 2)))
            lines[-1].append(f"  {fact}", "" if len(lines) == 1 else "dim")
        return Text("\n").join(lines)

    def on_resize(self) -> None:
        """Wrap the lines again."""
        if self._runs:
            self.show_runs(self._runs, self._expanded)
