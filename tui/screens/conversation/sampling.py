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

CANDIDATES = "k"  # is about the table of the next token's candidates
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
    _declare(
        CANDIDATES, "a whole number from 0 to 50 (0: no table)", lambda value: 0 <= value <= 50
    ),
)


@dataclass(frozen=True)
class Settings:
    """How models are asked."""

    sampling: Sampling
    system: str | None = None
    chat: bool | None = None


class SamplingDialog(ModalScreen[Settings | None]):
    """Edits the sampling; the system prompt and whether prompts use the chat template, unless these
    are None. Returns all once they are valid, or None on Escape.
    """

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

    def __init__(
        self,
        sampling: Sampling,
        *,
        system: str | None = None,
        chat: bool | None = None,
        candidates: bool = True,
    ) -> None:
        super().__init__()
        fields = [field for field in FIELDS if candidates or field.key != CANDIDATES]
        values = {key: str(value).removesuffix(".0") for key, value in asdict(sampling).items()}
        if chat is not None:
            fields.append(CHAT)
            values["chat"] = "on" if chat else "off"
        self._given = Settings(sampling, system, chat)
        self.form = Form(fields, values, always=True)
        self.system = TextArea(system or "", compact=True, tab_behavior="focus")

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="dialog") as dialog:
            dialog.border_title = "Sampling" if self._given.system is None else "Settings"
            dialog.border_subtitle = "Enter, Ctrl+S use  Tab next field  Esc cancel"
            if self._given.system is not None:
                yield Label("System prompt", markup=False)
                yield self.system
            yield self.form

    def on_mount(self) -> None:
        if self._given.system is None:
            self.form.take_focus()
        else:
            self.set_focus(self.system)

    @on(Form.Submitted)
    def action_use(self) -> None:
        form, given = self.form, self._given
        wrong = next((key for key in form.fields if form.problem(key)), "")
        if wrong:
            form.point(wrong)
            return
        values = asdict(given.sampling) | {key: form.value(key) for key in form.fields}
        chat = values.pop("chat", None)
        system = None if given.system is None else self.system.text.strip()
        self.dismiss(Settings(Sampling(**values), system, None if chat is None else chat == "on"))
