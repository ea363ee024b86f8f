"""The calculator's form, which shows only fields that are relevant to the method, and the search
for a model.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.events import DescendantBlur
from textual.fuzzy import FuzzySearch
from textual.message import Message
from textual.widget import Widget
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option

from pipeline.calc.sources.open_model import hub_ids
from tui.screens.calculator.query import FIELDS, SECTIONS, Query, relevant_fields
from tui.widgets.form import Form, FormField

MAX_MATCHES = 9


class ModelSearch(Vertical):
    """The field for a model, with a list of matching built-in names while typing."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("down", "highlight(1)", "Next match", show=False),
        Binding("up", "highlight(-1)", "Match before", show=False),
    ]

    class Selected(Message):
        """A model was selected or entered; it may have to be fetched."""

    def __init__(self, entry: Input) -> None:
        super().__init__()
        self._entry, self._matches, self._fuzzy = (
            entry,
            OptionList(compact=True, markup=False),
            FuzzySearch(),
        )
        self._matches.can_focus = False

    def compose(self) -> ComposeResult:
        yield self._entry
        yield self._matches

    def matches(self, text: str) -> Sequence[str]:
        """Names whose name or hub id contains `text`, prefix matches first; if there are none,
        fuzzy matches.
        """
        text, catalogue = text.strip().lower(), hub_ids()
        names = [
            name for name, hub_id in catalogue.items() if text in name or text in hub_id.lower()
        ]
        if names or not text:
            return sorted(names, key=lambda name: not name.startswith(text))
        scores = {
            name: self._fuzzy.match(text, f"{name} {hub_id}")[0]
            for name, hub_id in catalogue.items()
        }
        return sorted(
            (name for name, score in scores.items() if score), key=lambda name: -scores[name]
        )

    @on(Input.Changed)
    def _text_changed(self, event: Input.Changed) -> None:
        names = self.matches(event.value)[:MAX_MATCHES] if event.value.strip() else []
        self.set_class(self._entry.has_focus and bool(names) and names != [event.value], "-open")
        if self.has_class("-open"):
            ids = hub_ids()
            self._matches.set_options(
                Option(Text.assemble(f"{n:20} ", (ids[n], "dim")), id=n) for n in names
            )
            self._matches.highlighted = 0

    @on(DescendantBlur)
    def close(self) -> None:
        self.remove_class("-open")

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:  # noqa: ARG002  # name given by Textual
        return self.has_class("-open") if action == "highlight" else True

    def action_highlight(self, by: int) -> None:
        self._matches.highlighted = (
            (self._matches.highlighted or 0) + by
        ) % self._matches.option_count

    @on(Input.Submitted)
    def _submitted(self, event: Input.Submitted) -> None:
        event.stop()
        is_path = "/" in event.value  # or an id on the hub: what was typed is meant, not a match
        if self.has_class("-open") and not is_path and (option := self._matches.highlighted_option):
            self._select(option.id or "")
        else:
            self.close()
            self.post_message(self.Selected())

    @on(OptionList.OptionSelected)
    def _clicked(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        self._select(event.option_id or "")

    def _select(self, name: str) -> None:
        with self.prevent(Input.Changed):
            self._entry.value = name
        self._entry.cursor_position = len(name)
        self.close()
        self.post_message(self.Selected())


class CalcForm(Form):
    """Posts Changed at every change of a field, and `ModelSearch.Selected` when a model was
    entered.

    Its sections have headings where the screen is high enough.
    """

    def __init__(self) -> None:
        super().__init__(list(FIELDS.values()))

    def compose(self) -> ComposeResult:
        for key, line in self.lines.items():
            if key in SECTIONS:
                yield Static(SECTIONS[key], classes="heading", markup=False)
            yield line

    def beside(self, field: FormField) -> Iterable[Widget]:
        editor = self.editors[field.key]
        return [
            ModelSearch(editor) if field.key == "model" and isinstance(editor, Input) else editor
        ]

    def label(self, field: FormField, invalid: bool = False) -> str:
        return f"{'✗' if invalid else ' '}{super().label(field)}"

    def on_mount(self) -> None:
        self.show_relevant()

    @property
    def values(self) -> Query:
        """What is typed in the fields."""
        return {key: editor.value for key, editor in self.editors.items()}

    def fill(self, values: Mapping[str, str]) -> None:
        super().fill(values)
        self.query_one(ModelSearch).close()

    @on(Form.Changed)
    def show_relevant(self) -> None:
        """Hide and disable the fields that are not relevant to the method, so that tab skips
        them.
        """
        names = relevant_fields(self.values)
        for key, line in self.lines.items():
            line.display, line.disabled = key in names, key not in names

    def mark_invalid(self, invalid: Collection[str]) -> None:
        """Mark these fields as invalid, and no other: most rules are about several fields
        together.
        """
        for key in self.fields:
            self.set_bad(key, key in invalid)
