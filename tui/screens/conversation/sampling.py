"""The dialog of the sampling settings, with what else decides how a model answers."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Label, TextArea

from tui.panes.fields import Field, Kind
from tui.panes.form import Form
from tui.services.loaded_models import Sampling

CHAT = Field(
    "chat",
    "choice",
    label="chat template",
    choices=("on", "off"),
    note="of the models that have one",
)


def _declare(key: str, rule: str, is_valid: Callable[[Any], bool]) -> Field:
    label = key.replace("_", "-")
    kind: Kind = "number" if isinstance(getattr(Sampling, key), float) else "integer"

    def problem(value: Any) -> str:
        """`value` is still the typed text if that is no number."""
        if not isinstance(value, str) and is_valid(value):
            return ""
        return f"{label} must be {rule}, got {str(value)!r}."

    return Field(key, kind, label=label, note=rule, problem=problem)


FIELDS = (
    _declare("temperature", "a number from 0", lambda value: 0 <= value < math.inf),
    _declare("top_k", "a whole number from 0 (0 cuts nothing)", lambda value: value >= 0),
    _declare("top_p", "above 0 up to 1 (1 cuts nothing)", lambda value: 0 < value <= 1),
    _declare("seed", "a whole number below 2^63", lambda value: 0 <= value < 2**63),
    _declare("limit", "a whole number from 1 to 10000", lambda value: 1 <= value <= 10_000),
    _declare("k", "a whole number from 0 to 50 (0: no table)", lambda value: 0 <= value <= 50),
)


@dataclass(frozen=True)
class Settings:
    """How models are asked. The dialog leaves out what is None."""

    sampling: Sampling
    system: str | None = None
    chat: bool | None = None


class SamplingDialog(ModalScreen[Settings | None]):
    """Edits the settings; returns them once they are valid, or None on Escape."""

    AUTO_FOCUS = ""
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Close"),
        Binding("ctrl+s", "use", "Use"),
    ]
    DEFAULT_CSS = """
    SamplingDialog {
        align: center middle;
        TextArea { height: 4; background: $boost; margin-bottom: 1; }
        Form { height: auto; }
    }
    """

    def __init__(self, given: Settings) -> None:
        super().__init__()
        values = {**asdict(given.sampling), "chat": "on" if given.chat else "off"}
        fields = [*FIELDS, CHAT] if given.chat is not None else FIELDS
        self.form = Form(fields, values, always=True)
        self.system = TextArea(given.system or "", compact=True, tab_behavior="focus")
        self._has_system = given.system is not None

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="dialog") as dialog:
            dialog.border_title = "Settings"
            dialog.border_subtitle = "Enter, Ctrl+S use  Tab next field  Esc cancel"
            if self._has_system:
                yield Label("System prompt")
                yield self.system
            yield self.form

    def on_mount(self) -> None:
        if self._has_system:
            self.set_focus(self.system)
        else:
            self.form.take_focus()

    @on(Form.Submitted)
    def action_use(self) -> None:
        form = self.form
        wrong = [key for key in form.fields if form.problem(key)]
        if wrong:
            form.point(wrong[0])
            return
        values = {key: form.value(key) for key in form.fields}
        chat = values.pop("chat", None) == "on"
        self.dismiss(Settings(Sampling(**values), self.system.text.strip(), chat))
