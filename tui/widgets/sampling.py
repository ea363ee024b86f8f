"""The dialog of the sampling settings."""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any, ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widget import Widget
from textual.widgets import Button, Checkbox, Static

from tui.services.loaded_models import Sampling
from tui.widgets.form import Form, FormField, Kind


def _declare(key: str, rule: str, allowed: Callable[[Any], bool]) -> FormField:
    label = key.replace("_", "-")
    kind: Kind = "number" if isinstance(getattr(Sampling, key), float) else "integer"

    def problem(value: Any) -> str:
        """`value` is still the typed text if that is no number."""
        if not isinstance(value, str) and allowed(value):
            return ""
        return f"{label} must be {rule}, got {format_setting(value)!r}."

    return FormField(key, kind, label=label, rule=rule, problem=problem)


def format_setting(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


SAMPLING_FIELDS = (
    _declare("temperature", "a number from 0", lambda value: 0 <= value < math.inf),
    _declare("top_k", "a whole number from 0 (0 cuts nothing)", lambda value: value >= 0),
    _declare("top_p", "above 0 up to 1 (1 cuts nothing)", lambda value: 0 < value <= 1),
    _declare("seed", "a whole number below 2^63", lambda value: 0 <= value < 2**63),
    _declare("limit", "a whole number from 1 to 10000", lambda value: 1 <= value <= 10_000),
    _declare("k", "a whole number from 1 to 50", lambda value: 1 <= value <= 50),
)


class ClearCheckbox(Checkbox):
    """A check box that is empty when off: Textual's differs in colour only."""

    @property
    def _button(self) -> Content:
        self.BUTTON_INNER = "X" if self.value else " "
        return super()._button


class SamplingForm(Form):
    """A rule beside each field."""

    def beside(self, field: FormField) -> Iterable[Widget]:
        return (*super().beside(field), Static(field.rule, classes="rule"))


class SamplingScreen(ModalScreen[tuple[Sampling, bool] | None]):
    """Edits the sampling and whether prompts use the chat template; returns both once valid, or
    None on Escape.
    """

    AUTO_FOCUS = "Input"
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "dismiss(None)", "Close")]
    DEFAULT_CSS = """
    SamplingScreen { align: center middle; }
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
            yield SamplingForm(
                SAMPLING_FIELDS, {k: format_setting(v) for k, v in asdict(self._sampling).items()}
            )
            label = (
                "chat template"
                if self._has_chat
                else "chat template (no model asked so far has one)"
            )
            yield ClearCheckbox(
                label, self._chat and self._has_chat, compact=True, disabled=not self._has_chat
            )
            yield Static(classes="wrong", markup=False)
            yield Button("Use", compact=True, variant="primary")

    @on(Form.Submitted)
    @on(Button.Pressed)
    def use(self) -> None:
        form = self.query_one(SamplingForm)
        if problem := next(filter(None, map(form.problem, form.fields)), ""):
            self.query_one(".wrong", Static).update(f"✗ {problem}")
        else:
            sampling = Sampling(**{key: form.value(key) for key in form.fields})
            self.dismiss((sampling, self.query_one(Checkbox).value))
