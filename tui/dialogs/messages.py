"""`F8`: all messages since the start."""

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
    """A message and its time."""

    when: datetime
    severity: Severity
    text: str


class MessagesScreen(ModalScreen[None]):
    """Lists the messages, which otherwise are shown as toasts only; newest last."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,f8,q", "dismiss", "Close")]

    def __init__(self, messages: Sequence[Message]) -> None:
        super().__init__()
        self._messages = messages

    def compose(self) -> ComposeResult:
        lines = Table.grid(padding=(0, 2))
        for when, severity, text in self._messages:
            lines.add_row(f"{when:%H:%M:%S}", text, style=STYLES[severity])
        with VerticalScroll(classes="dialog"):
            yield Static(lines if self._messages else "No messages yet.")
