"""The calculator's form: one line per field, showing only fields relevant to the method."""

from collections.abc import Iterable
from dataclasses import replace
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.message import Message
from textual.widget import Widget
from textual.widgets import Input, Label

from pipeline.calc.fit import gpus
from pipeline.calc.precision import PRECISIONS
from pipeline.calc.settings import CHOICES, METHODS, OPTIMIZERS
from pipeline.calc.sources.open_model import hub_ids
from pipeline.calc.target_modules import GROUPS
from tui.screens.calculator.model import CUSTOM, FIELDS, CalculatorQuery, relevant_fields
from tui.screens.calculator.model_search import ModelSearch
from tui.widgets.select import Choice
from tui.widgets.text_field import Entry, counting, cycling, doubling

TARGETS = (*GROUPS, "all-linear", "q_proj, v_proj", "q_proj, k_proj, v_proj, o_proj", "qkv_proj, o_proj", "c_attn")
LABELS = {"ends": "embeddings", "gib": "GPU's GiB", "gpu": "GPU", "virtual_tokens": "virtual tok."}
LABELS["adapter_precision"] = "adapter prec."


class CalcForm(Vertical):
    """Posts Changed at every change of a field, and Fetch when a model was entered."""

    DEFAULT_CSS = """
    CalcForm { height: auto; }
    CalcForm .field { height: 1; }
    CalcForm .field Label { width: 16; color: $text-muted; }
    CalcForm .field:focus-within Label { color: $foreground; text-style: bold; }
    CalcForm .field.-wrong Label { color: $text-error; text-style: bold; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "app.focus_previous", "Field above", show=False),
        Binding("down", "app.focus_next", "Field below", show=False),
    ]

    class Changed(Message):
        """The value of a field changed."""

    class Fetch(Message):
        """A model was entered: if it is neither built in nor a path, it may be fetched from the hub."""

    def __init__(self, query: CalculatorQuery) -> None:
        super().__init__()
        self._values = query

    def compose(self) -> ComposeResult:
        for name, editor in self._editors():
            with Horizontal(classes="field", id=f"field-{name}"):
                yield Label(self._label(name))
                yield editor

    def _editors(self) -> Iterable[tuple[str, Widget]]:
        shown = self._values
        choices = {
            "method": {name: name for name in METHODS},
            "embeddings": {name: name.replace("_", " ") for name in CHOICES["embeddings"]},
            "ends": {"train": "train", "freeze": "freeze"},
            "adapter_precision": {name: name for name in CHOICES["adapter-precision"]},
            "checkpointing": {"": "auto", **{name: name for name in CHOICES["checkpointing"]}},
            "optimizer": {name: name for name in OPTIMIZERS},
            "loss": {name: name for name in CHOICES["loss"]},
            "gpu": {gpu.name: gpu.label for gpu in gpus().values()} | {CUSTOM: "custom, GiB below"},
        }
        steps = {"alpha": doubling, "rank": doubling, "batch": counting, "sequence": doubling, "gib": doubling}
        for name in FIELDS:
            value = getattr(shown, name)
            if name == "model":
                yield name, ModelSearch(value, hub_ids(), id="search")
            elif name in choices:
                yield name, Choice(choices[name], value, id=name)
            elif name == "targets":
                yield name, Entry(value, id=name, step=cycling(TARGETS), suggested=TARGETS)
            elif name == "precision":
                yield name, Entry(value, id=name, step=cycling(list(PRECISIONS)), suggested=list(PRECISIONS))
            else:
                yield name, Entry(value, id=name, step=steps.get(name, counting))

    def on_mount(self) -> None:
        self._show_relevant()

    @property
    def values(self) -> CalculatorQuery:
        """The values of the fields."""
        return self._values

    def fill(self, query: CalculatorQuery) -> None:
        """Set all fields, and post a single Changed."""
        with self.prevent(Input.Changed):
            for name in FIELDS:
                self._editor(name).value = getattr(query, name)
        self.query_one(ModelSearch).close()
        self._values = query
        self._show_relevant()
        self.post_message(self.Changed())

    def set_placeholders(self, **values: str) -> None:
        """Set placeholders: the values that empty fields stand for."""
        for name, value in values.items():
            editor = self._editor(name)
            if isinstance(editor, Input) and editor.placeholder != value:
                editor.placeholder = value

    def mark_invalid(self, invalid: str | None) -> None:
        """Mark one field as invalid, or none."""
        for name in FIELDS:
            row = self.query_one(f"#field-{name}")
            if row.has_class("-wrong") != (name == invalid):
                row.set_class(name == invalid, "-wrong")
                row.query_one(Label).update(self._label(name, name == invalid))

    def step(self, name: str) -> None:
        """Step a field to its next value."""
        self._editor(name).action_step(1)

    def _label(self, name: str, invalid: bool = False) -> str:
        return f"{'✗' if invalid else ' '} {LABELS.get(name, name.replace('_', ' '))}"

    def _editor(self, name: str) -> Entry | Choice:
        editor = self.query_one(f"#{name}")
        assert isinstance(editor, Entry | Choice)
        return editor

    @on(Input.Changed)
    @on(Choice.Changed)
    def _changed(self, event: Input.Changed | Choice.Changed) -> None:
        event.stop()
        editor = event.control
        if editor.id and getattr(self._values, editor.id) != editor.value:
            self._values = replace(self._values, **{editor.id: editor.value})
            self._show_relevant()
            self.post_message(self.Changed())

    @on(ModelSearch.Changed)
    @on(ModelSearch.Selected)
    def _model(self, event: ModelSearch.Changed | ModelSearch.Selected) -> None:
        event.stop()
        self._values = replace(self._values, model=self._editor("model").value)
        self.post_message(self.Fetch() if isinstance(event, ModelSearch.Selected) else self.Changed())

    def _show_relevant(self) -> None:
        """Hide and disable the fields that are not relevant to the method, so that tab skips them."""
        names = relevant_fields(self._values)
        for name in FIELDS:
            row = self.query_one(f"#field-{name}")
            if row.display != (name in names):
                row.display = name in names
                row.disabled = name not in names
