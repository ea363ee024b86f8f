"""A dialog in which one of several is chosen."""

from collections.abc import Mapping
from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import OptionList
from textual.widgets.option_list import Option


class Menu(ModalScreen[str | None]):
    """Returns the key of the chosen line; None if Escape was pressed."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,q", "dismiss(None)", "Close"),
        Binding("j", "focused.cursor_down", "Down", show=False),
        Binding("k", "focused.cursor_up", "Up", show=False),
    ]

    def __init__(self, title: str, choices: Mapping[str, str | Content], chosen: str = "") -> None:
        super().__init__()
        self._title, self._choices, self._chosen = title, choices, chosen

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog -fit") as dialog:
            dialog.border_title = Content(self._title)
            dialog.border_subtitle = "Enter choose  Esc cancel"
            options = (Option(text, id=key) for key, text in self._choices.items())
            yield OptionList(*options, compact=True, markup=False)

    def on_mount(self) -> None:
        if self._chosen in self._choices:
            chosen = list(self._choices).index(self._chosen)
            self.query_one(OptionList).highlighted = chosen

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        self.dismiss(event.option_id)
