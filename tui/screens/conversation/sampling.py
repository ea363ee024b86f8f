"""How models are sampled, and the dialog that sets it."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Label, TextArea

from tui.panes.fields import Field, Kind
from tui.panes.form import Form


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 is greedy; top_k 0 and top_p 1 are off. `limit`: maximum tokens; `k`: rows of
    the top-k table.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    limit: int = 20
    k: int = 5

    def __str__(self) -> str:
        facts = ["greedy"]
        if self.temperature:
            facts = [f"temperature {self.temperature:g}"]
            facts += [f"top-k {self.top_k}"] * (self.top_k > 0)
            facts += [f"top-p {self.top_p:g}"] * (self.top_p < 1)
            facts += [f"seed {self.seed}"]
        facts += [f"{self.limit} tokens"]
        facts += [f"{self.k} candidates"] * bool(self.k)
        return " · ".join(facts)


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
    Field(
        "template",
        "choice",
        label="chat template",
        choices=("on", "off"),
        note="of the models that have one",
    ),
)


class SamplingDialog(ModalScreen[dict[str, Any] | None]):
    """Edits the fields that are given, and the system prompt if it is; returns their values once they
    are valid, or None on Escape.
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

    def __init__(self, given: Mapping[str, Any]) -> None:
        super().__init__()
        fields = [field for field in FIELDS if field.key in given]
        self.form = Form(fields, given, always=True)
        self.system = TextArea(given.get("system", ""), compact=True, tab_behavior="focus")
        self._given = given

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="dialog") as dialog:
            dialog.border_title = "Settings"
            dialog.border_subtitle = "Enter, Ctrl+S use  Tab next field  Esc cancel"
            if "system" in self._given:
                yield Label("System prompt")
                yield self.system
            yield self.form

    def on_mount(self) -> None:
        if "system" in self._given:
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
        if "system" in self._given:
            values["system"] = self.system.text.strip()
        self.dismiss(values)
