"""`F8`: all that was said since the start."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import ClassVar, Literal, NamedTuple

from rich.table import Table
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

Severity = Literal["information", "warning", "error"]
STYLES: Mapping[Severity, str] = {"error": "bold red", "warning": "yellow", "information": ""}


class Message(NamedTuple):
    """What was said, and when."""

    when: datetime
    severity: Severity
    text: str


class MessagesScreen(ModalScreen[None]):
    """Toasts go; here they stay, newest last."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,f8,q", "dismiss", "Close")]

    def __init__(self, said: Sequence[Message]) -> None:
        super().__init__()
        self._said = said

    def compose(self) -> ComposeResult:
        lines = Table.grid(padding=(0, 2))
        for when, severity, text in self._said:
            lines.add_row(f"{when:%H:%M:%S}", text, style=STYLES[severity])
        with VerticalScroll(classes="dialog"):
            yield Static(lines if self._said else "Nothing was said yet.")
