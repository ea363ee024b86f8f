"""`?`: every key that does something here."""

from typing import ClassVar

from rich.table import Table
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from tui.app import Workbench


class HelpScreen(ModalScreen[None]):
    """The keys of the screen below, as the user has mapped them."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,question_mark,q", "dismiss", "Close")]

    def compose(self) -> ComposeResult:
        assert isinstance(self.app, Workbench)
        keys = Table.grid(padding=(0, 2))
        for names, binding in self.app.keys_of(self.app.screen_stack[-2]):
            keys.add_row(names, binding.description, binding.id or "")
        with VerticalScroll(classes="dialog"):
            yield Static("Keys here; the names on the right can be given other keys in the config file.\n")
            yield Static(keys)
