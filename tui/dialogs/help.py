"""`?`: the keys of the current screen."""

from collections.abc import Sequence
from typing import ClassVar

from rich.table import Table
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static


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
