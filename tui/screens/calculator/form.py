"""The calculator's form: a line a field, only those that matter to the method."""

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
from tui.screens.calculator.model import CUSTOM, FIELDS, CalculatorQuery, relevant
from tui.screens.calculator.model_search import ModelSearch
from tui.widgets.select import Choice
from tui.widgets.text_field import Entry, counting, cycling, doubling

TARGETS = (*GROUPS, "all-linear", "q_proj, v_proj", "q_proj, k_proj, v_proj, o_proj", "qkv_proj, o_proj", "c_attn")
LABELS = {"ends": "embeddings", "gib": "GPU's GiB", "gpu": "GPU", "virtual_tokens": "virtual tok."}
LABELS["adapter_precision"] = "adapter prec."


class CalcForm(Vertical):
    """Posts Changed at every change of a field, Fetch where a model is to be looked for elsewhere."""

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
        """A field has another value."""

    class Fetch(Message):
        """The model's field was entered: what is neither built in nor a path may be fetched."""

    def __init__(self, asked: CalculatorQuery) -> None:
        super().__init__()
        self._shown = asked

    def compose(self) -> ComposeResult:
        for name, editor in self._editors():
            with Horizontal(classes="field", id=f"field-{name}"):
                yield Label(self._label(name))
                yield editor

    def _editors(self) -> Iterable[tuple[str, Widget]]:
        shown = self._shown
        choices = {
            "method": {name: name for name in METHODS},
            "embeddings": {name: name.replace("_", " ") for name in CHOICES["embeddings"]},
            "ends": {"train": "train", "freeze": "freeze"},
            "adapter_precision": {name: name for name in CHOICES["adapter-precision"]},
            "checkpointing": {"": "as suits", **{name: name for name in CHOICES["checkpointing"]}},
            "optimizer": {name: name for name in OPTIMIZERS},
            "loss": {name: name for name in CHOICES["loss"]},
            "gpu": {one.name: one.label for one in gpus().values()} | {CUSTOM: "custom, GiB below"},
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
        self._enable()

    @property
    def asked(self) -> CalculatorQuery:
        """What the fields hold."""
        return self._shown

    def fill(self, asked: CalculatorQuery) -> None:
        """Put values into all fields, with one Changed."""
        with self.prevent(Input.Changed):
            for name in FIELDS:
                self._editor(name).value = getattr(asked, name)
        self.query_one(ModelSearch).close()
        self._shown = asked
        self._enable()
        self.post_message(self.Changed())

    def hint(self, **values: str) -> None:
        """What a field that is left empty means now."""
        for name, value in values.items():
            editor = self._editor(name)
            if isinstance(editor, Input) and editor.placeholder != value:
                editor.placeholder = value

    def mark(self, wrong: str | None) -> None:
        """Mark one field as wrong, or none."""
        for name in FIELDS:
            row = self.query_one(f"#field-{name}")
            if row.has_class("-wrong") != (name == wrong):
                row.set_class(name == wrong, "-wrong")
                row.query_one(Label).update(self._label(name, name == wrong))

    def step(self, name: str) -> None:
        """The next value of a field, as its own keys do it."""
        self._editor(name).action_step(1)

    def _label(self, name: str, wrong: bool = False) -> str:
        return f"{'✗' if wrong else ' '} {LABELS.get(name, name.replace('_', ' '))}"

    def _editor(self, name: str) -> Entry | Choice:
        found = self.query_one(f"#{name}")
        assert isinstance(found, Entry | Choice)
        return found

    @on(Input.Changed)
    @on(Choice.Changed)
    def _changed(self, event: Input.Changed | Choice.Changed) -> None:
        event.stop()
        editor = event.control
        if editor.id and getattr(self._shown, editor.id) != editor.value:
            self._shown = replace(self._shown, **{editor.id: editor.value})
            self._enable()
            self.post_message(self.Changed())

    @on(ModelSearch.Typed)
    @on(ModelSearch.Taken)
    def _model(self, event: ModelSearch.Typed | ModelSearch.Taken) -> None:
        event.stop()
        self._shown = replace(self._shown, model=self._editor("model").value)
        self.post_message(self.Fetch() if isinstance(event, ModelSearch.Taken) else self.Changed())

    def _enable(self) -> None:
        """Fields of other methods are neither shown nor in the way of tab."""
        matter = relevant(self._shown)
        for name in FIELDS:
            row = self.query_one(f"#field-{name}")
            if row.display != (name in matter):
                row.display = name in matter
                row.disabled = name not in matter
