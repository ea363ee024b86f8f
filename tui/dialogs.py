"""Dialogs over any screen: a text to read, its keys (`?`), the messages since the start (F8), a question for a path."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import ClassVar, Literal, NamedTuple

from rich.console import RenderableType
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


class Reader(ModalScreen[None]):
    """A scrollable text, closed by Escape, q, or a key that a subclass adds: the one that opened it."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q", "dismiss", "Close")]

    def __init__(self, *parts: RenderableType) -> None:
        super().__init__()
        self._parts = parts

    def compose(self) -> ComposeResult:
        yield VerticalScroll(*map(Static, self._parts), classes="dialog")


class HelpScreen(Reader):
    """Lists the keys of the screen below, as configured by the user."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("question_mark", "dismiss", "Close")]

    def __init__(self, keys: Sequence[tuple[str, Binding]]) -> None:
        rows = Table.grid(padding=(0, 2))
        for names, binding in keys:
            rows.add_row(names, binding.description, binding.id or "")
        super().__init__("Keys here; the names on the right can be given other keys in the config file.\n", rows)


class MessagesScreen(Reader):
    """Lists the messages, which otherwise are shown as toasts only; newest last."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("f8", "dismiss", "Close")]

    def __init__(self, messages: Sequence[Message]) -> None:
        rows = Table.grid(padding=(0, 2))
        for when, severity, text in messages:
            rows.add_row(f"{when:%H:%M:%S}", text, style=STYLES[severity])
        super().__init__(rows if messages else "No messages yet.")


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
