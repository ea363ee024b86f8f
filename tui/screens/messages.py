"""`F8`: all that was said since the start."""

from typing import ClassVar

from rich.table import Table
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from tui.app import Workbench

STYLES = {"error": "bold red", "warning": "yellow", "information": ""}


class MessagesScreen(ModalScreen[None]):
    """Toasts go; here they stay, newest last."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,f8,q", "dismiss", "Close")]

    def compose(self) -> ComposeResult:
        assert isinstance(self.app, Workbench)
        lines = Table.grid(padding=(0, 2))
        for when, severity, text in self.app.said:
            lines.add_row(f"{when:%H:%M:%S}", text, style=STYLES[severity])
        with VerticalScroll(classes="dialog"):
            yield Static(lines if self.app.said else "Nothing was said yet.")
