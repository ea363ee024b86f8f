"""The dialog of the system prompt and the sampling."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Label, Static, TextArea

from tui.services.loaded_models import Sampling
from tui.widgets.form import Form
from tui.widgets.sampling import SAMPLING_FIELDS, SamplingForm, format_setting

FIELDS = [field for field in SAMPLING_FIELDS if field.key != "k"]  # that of the table of candidates


class SettingsScreen(ModalScreen[tuple[str, Sampling] | None]):
    """Returns system prompt and sampling once they are valid; None on Escape."""

    AUTO_FOCUS = "TextArea"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape", "dismiss(None)", "Close"),
        Binding("ctrl+s", "use", "Use"),
    ]
    DEFAULT_CSS = """
    SettingsScreen { align: center middle; }
    SettingsScreen TextArea { height: 4; background: $boost; margin-bottom: 1; }
    SettingsScreen .dialog SamplingForm Label { width: 13; }
    SettingsScreen Input { width: 14; margin-right: 1; }
    SettingsScreen .rule { width: 1fr; color: $text-muted; }
    SettingsScreen .wrong { color: $text-error; height: auto; margin-top: 1; }
    """

    def __init__(self, system: str, sampling: Sampling) -> None:
        super().__init__()
        self._system, self._sampling = system, sampling

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="dialog") as dialog:
            dialog.border_title = "Settings"
            dialog.border_subtitle = "Ctrl+S use  Tab next field  Esc cancel"
            yield Label("System prompt", markup=False)
            yield TextArea(self._system, compact=True, tab_behavior="focus")
            values = {key: format_setting(value) for key, value in asdict(self._sampling).items()}
            yield SamplingForm(FIELDS, values)
            yield Static(classes="wrong", markup=False)

    @on(Form.Submitted)
    def action_use(self) -> None:
        form = self.query_one(SamplingForm)
        if problem := next(filter(None, map(form.problem, _keys(form))), ""):
            self.query_one(".wrong", Static).update(f"✗ {problem}")
            return
        sampling = replace(self._sampling, **{key: form.value(key) for key in _keys(form)})
        self.dismiss((self.query_one(TextArea).text.strip(), sampling))


def _keys(form: SamplingForm) -> Sequence[str]:
    return list(form.fields)
