"""The dialog that chooses one or two models."""

from collections.abc import Sequence
from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList

from pipeline.views.model_library import Entry
from tui.screens.chat.session import MOST_MODELS, method_of
from tui.widgets.colors import method_look
from tui.widgets.table import VIM_KEYS
from tui.widgets.text import KeyedList


class ModelPicker(ModalScreen[list[str] | None]):
    """Returns the paths of the chosen models, first the one that was chosen first; None on
    Escape.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "leave", "Close"),
        Binding("space", "choose", "Choose"),
        Binding("slash", "filter", "Filter"),
        *VIM_KEYS,
    ]
    DEFAULT_CSS = """
    ModelPicker { align: center middle; }
    ModelPicker Input { display: none; margin-bottom: 1; }
    ModelPicker Input.-open { display: block; }
    """

    def __init__(self, entries: Sequence[Entry], chosen: Sequence[str]) -> None:
        super().__init__()
        self._entries = {str(entry.model.path): entry for entry in entries}
        self._chosen = [path for path in chosen if path in self._entries]
        self._was_chosen = False  # with Space: else Enter means the model under the cursor alone
        self._field, self._list = Input(placeholder="filter", compact=True), KeyedList(markup=False)

    def compose(self) -> ComposeResult:
        with Vertical(classes="dialog") as dialog:
            dialog.border_title = "Models: one, or two side by side"
            dialog.border_subtitle = "Enter use  Space choose, at most two  / filter  Esc cancel"
            yield self._field
            yield self._list

    def on_mount(self) -> None:
        self._show()
        self.set_focus(self._list)

    def _show(self) -> None:
        needle = self._field.value.lower()
        fitting = {
            path: entry for path, entry in self._entries.items() if needle in entry.label.lower()
        }
        width = max((len(entry.label) for entry in fitting.values()), default=0)
        self._list.show({path: self._line(path, entry, width) for path, entry in fitting.items()})

    def _line(self, path: str, entry: Entry, width: int) -> Text:
        model = entry.model
        number = f"{self._chosen.index(path) + 1}" if path in self._chosen else " "
        sign, style = method_look(method_of(entry)).sign, "bold" if path in self._chosen else ""
        facts = [
            model.method if model.method != entry.label else "",
            f"rank {model.rank}" if model.rank else "",
        ]
        line = Text(
            f"{number} {sign} {entry.label:<{width}}", style, no_wrap=True, overflow="ellipsis"
        )
        return line.append(f"  {' · '.join(filter(None, facts))}", "dim")

    @on(Input.Changed)
    def _filter(self) -> None:
        self._show()

    @on(Input.Submitted)
    def _to_list(self) -> None:
        self.set_focus(self._list)

    def action_filter(self) -> None:
        self._field.add_class("-open")
        self.app.stylesheet.update(self)  # keys already typed are meant for the field
        self.set_focus(self._field)

    def action_leave(self) -> None:
        if self._field.has_class("-open"):
            self._field.value = ""
            self._field.remove_class("-open")
            self.set_focus(self._list)
        else:
            self.dismiss(None)

    def action_choose(self) -> None:
        option = self._list.highlighted_option
        if option is None or option.id is None:
            return
        self._was_chosen = True
        if option.id in self._chosen:
            self._chosen.remove(option.id)
        else:  # the one chosen last makes room
            self._chosen = [*self._chosen[: MOST_MODELS - 1], option.id]
        self._show()

    def action_cursor_down(self) -> None:
        self._list.action_cursor_down()

    def action_cursor_up(self) -> None:
        self._list.action_cursor_up()

    @on(OptionList.OptionSelected)
    def _use(self, event: OptionList.OptionSelected) -> None:
        path = str(event.option_id)
        self.dismiss(self._chosen if self._was_chosen and self._chosen else [path])
