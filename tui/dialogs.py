"""Dialogs over any screen: its keys (`?`), the messages since the start (F8), a question for a path."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import ClassVar, Literal, NamedTuple

from rich.table import Table
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Input, Static

Severity = Literal["information", "warning", "error"]
STYLES: Mapping[Severity, str] = {"error": "bold red", "warning": "yellow", "information": ""}


class Message(NamedTuple):
    """A message and its time."""

    when: datetime
    severity: Severity
    text: str


class HelpScreen(ModalScreen[None]):
    """Lists the keys of the screen below, as configured by the user."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,question_mark,q", "dismiss", "Close")]

    def __init__(self, keys: Sequence[tuple[str, Binding]]) -> None:
        super().__init__()
        self._keys = keys

    def compose(self) -> ComposeResult:
        keys = Table.grid(padding=(0, 2))
        for names, binding in self._keys:
            keys.add_row(names, binding.description, binding.id or "")
        with VerticalScroll(classes="dialog"):
            yield Static("Keys here; the names on the right can be given other keys in the config file.\n")
            yield Static(keys)


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


class PathScreen(ModalScreen[str | None]):
    """Returns the typed text without surrounding spaces; None if it is empty or Escape was pressed."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Close")]

    def __init__(self, question: str, value: str = "") -> None:
        super().__init__()
        self._question, self._value = question, value

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog"):
            yield Static(f"{self._question}\n", markup=False)
            yield Input(self._value, placeholder="a path; Enter confirms, Escape cancels", select_on_focus=False)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        self.dismiss(event.value.strip() or None)
