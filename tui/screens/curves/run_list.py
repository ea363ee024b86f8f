"""The runs there are: switched on or off, each with its sign, its colour and what is known of it."""

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
    """One run: its key, whether it is drawn, its sign and colour, its name, and facts that may take several lines.

    `open`: of a sweep, whether its adapters are listed. Each of these has a row with the sweep's key in `of`.
    """

    key: str
    on: bool
    sign: str
    color: str
    label: str
    facts: Sequence[str] = ()
    open: bool | None = None
    of: str = ""


class RunList(OptionList):
    """Legend, status and switches in one."""

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
        """The run with this key is to be shown, or to be hidden."""

        key: str

    @dataclass
    class Opened(Message):
        """The adapters of the sweep with this key are to be listed, or no longer."""

        key: str

    @dataclass
    class Pointed(Message):
        """The highlight is on this row: a run or an adapter."""

        key: str

    def __init__(self) -> None:
        super().__init__(compact=True)
        self._rows: list[Row] = []

    @property
    def pointed(self) -> Row | None:
        """The row with the highlight."""
        at = self.highlighted
        return self._rows[at] if at is not None and at < len(self._rows) else None

    def show(self, rows: Sequence[Row]) -> None:
        """Show `rows`; the highlight stays on its run, or where it was if that is gone."""
        if [row.key for row in rows] == [row.key for row in self._rows]:
            for index, (row, before) in enumerate(zip(rows, self._rows, strict=True)):
                if row != before:
                    self.replace_option_prompt_at_index(index, self._text(row))
        else:
            places, pointed, at = {row.key: n for n, row in enumerate(rows)}, self.pointed, self.highlighted or 0
            if pointed is not None:
                at = places.get(pointed.key, places.get(pointed.of, at))
            self.clear_options()
            self.add_options([Option(self._text(row), id=row.key) for row in rows])
            self._rows = list(rows)
            self.highlighted = min(at, len(rows) - 1) if rows else None
        self._rows = list(rows)

    def on_resize(self) -> None:
        """Lines are filled anew."""
        for index, row in enumerate(self._rows):
            self.replace_option_prompt_at_index(index, self._text(row))

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """A sweep is shown or hidden as one."""
        event.stop()
        row = self._rows[event.option_index]
        self.post_message(self.Toggled(row.of or row.key))

    def on_option_list_option_highlighted(self, event: OptionList.OptionHighlighted) -> None:
        event.stop()
        if event.option_id is not None:
            self.post_message(self.Pointed(event.option_id))

    def action_open(self) -> None:
        row = self.pointed
        if row is not None and (row.of or row.open is not None):
            self.post_message(self.Opened(row.of or row.key))
        else:
            self.action_select()

    def _text(self, row: Row) -> Text:
        color = readable(Color.parse(row.color), self.background_colors[1]).hex
        box = " " * INDENT if row.of else "[x] " if row.on else "[ ] "
        opens = "" if row.open is None else "▾ " if row.open else "▸ "
        bold = "bold" if row.on and not row.of else ""
        first = Text.assemble(box, (row.sign, color), " ", (opens + row.label, bold))
        facts = [*row.facts[:2], OPENS, *row.facts[2:]] if row.open is False else row.facts
        lines, width = [first], max(self.size.width - 1, 40)
        for fact in facts:
            if lines[-1].cell_len + 2 + len(fact) > width and lines[-1].cell_len > INDENT:
                lines.append(Text(" " * (INDENT - 2)))
            lines[-1].append(f"  {fact}", "" if len(lines) == 1 else "dim")
        return Text("\n").join(lines)
