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


@dataclass(frozen=True)
class Row:
    """One run: its key, whether it is drawn, its sign and colour, its name, and facts that may take several lines."""

    key: str
    on: bool
    sign: str
    color: str
    label: str
    facts: Sequence[str] = ()


class RunList(OptionList):
    """Legend, status and switches in one."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space,enter", "select", "Show or hide the run", id="curves.toggle", show=False)
    ]
    DEFAULT_CSS = """
    RunList { height: auto; scrollbar-size-vertical: 1; border: none; padding: 0; background: $background; }
    RunList:focus { border: none; background: $background; }
    """

    @dataclass
    class Toggled(Message):
        """The run with this key is to be shown, or to be hidden."""

        key: str

    def __init__(self) -> None:
        super().__init__(compact=True)
        self._rows: list[Row] = []

    def show(self, rows: Sequence[Row]) -> None:
        """Show `rows`; the highlight stays where it was."""
        if [row.key for row in rows] == [row.key for row in self._rows]:
            for index, (row, before) in enumerate(zip(rows, self._rows, strict=True)):
                if row != before:
                    self.replace_option_prompt_at_index(index, self._text(row))
        else:
            highlighted = self.highlighted
            self.clear_options()
            self.add_options([Option(self._text(row), id=row.key) for row in rows])
            self.highlighted = min(highlighted or 0, len(rows) - 1) if rows else None
        self._rows = list(rows)

    def on_resize(self) -> None:
        """Lines are filled anew."""
        for index, row in enumerate(self._rows):
            self.replace_option_prompt_at_index(index, self._text(row))

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        if event.option_id is not None:
            self.post_message(self.Toggled(event.option_id))

    def _text(self, row: Row) -> Text:
        color = readable(Color.parse(row.color), self.background_colors[1]).hex
        first = Text.assemble(
            ("[x] " if row.on else "[ ] "), (row.sign, color), " ", (row.label, "bold" if row.on else "")
        )
        lines, width = [first], max(self.size.width - 1, 40)
        for fact in row.facts:
            if lines[-1].cell_len + 2 + len(fact) > width and lines[-1].cell_len > INDENT:
                lines.append(Text(" " * (INDENT - 2)))
            lines[-1].append(f"  {fact}", "" if len(lines) == 1 else "dim")
        return Text("\n").join(lines)
