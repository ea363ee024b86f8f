"""`t`: the sampling settings."""

from dataclasses import asdict
from typing import ClassVar, NamedTuple

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Button, Checkbox, Input, Label, Static

from pipeline.errors import UserError
from tui.screens.adapters.session.sampling import RULES, Sampling, parse


class PromptSettings(NamedTuple):
    """The settings that the user confirmed."""

    sampling: Sampling
    chat: bool


class ClearCheckbox(Checkbox):
    """A check box that is empty when off: Textual's differs in colour only."""

    @property
    def _button(self) -> Content:
        self.BUTTON_INNER = "X" if self.value else " "
        return super()._button


class SamplingScreen(ModalScreen[PromptSettings | None]):
    """Edits the settings; returns them only if all are valid, or None on Escape."""

    AUTO_FOCUS = "Input"
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Close")]
    DEFAULT_CSS = """
    SamplingScreen { align: center middle; }
    SamplingScreen Horizontal { height: 1; }
    SamplingScreen Label { width: 13; }
    SamplingScreen Input { width: 14; margin-right: 1; }
    SamplingScreen .rule { width: 1fr; color: $text-muted; }
    SamplingScreen .wrong { color: $error; height: auto; margin-top: 1; }
    """

    def __init__(self, sampling: Sampling, chat: bool, has_chat: bool) -> None:
        super().__init__()
        self._sampling, self._chat, self._has_chat = sampling, chat, has_chat

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="dialog"):
            for name, value in asdict(self._sampling).items():
                with Horizontal():
                    yield Label(name.replace("_", "-"))
                    yield Input(f"{value:g}" if isinstance(value, float) else str(value), compact=True, id=name)
                    yield Static(RULES[name][0], classes="rule")
            label = "chat template" if self._has_chat else "chat template (no model asked so far has one)"
            yield ClearCheckbox(label, self._chat and self._has_chat, compact=True, disabled=not self._has_chat)
            yield Static(classes="wrong", markup=False)
            yield Button("Use", compact=True, variant="primary")

    def on_input_submitted(self) -> None:
        self._use()

    def on_button_pressed(self) -> None:
        self._use()

    def _use(self) -> None:
        try:
            sampling = parse({field.id or "": field.value for field in self.query(Input)})
        except UserError as error:
            self.query_one(".wrong", Static).update(f"✗ {error}")
            return
        self.dismiss(PromptSettings(sampling, self.query_one(Checkbox).value))
