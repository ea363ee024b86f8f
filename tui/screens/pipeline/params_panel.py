"""A form for the params of a stage: values are checked while typing and saved on Enter."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import yaml
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.message import Message
from textual.widgets import Input, Label, Static

from pipeline.errors import UserError
from pipeline.project.params.edit import dump_inline
from pipeline.project.params.load import check, key_path
from pipeline.project.params.schema import Section, hints, rule
from pipeline.project.params.sections import Training

SCIENTIFIC = re.compile(r"[+-]?\d+(\.\d*)?e[+-]?\d+", re.IGNORECASE)


class ParamInput(Input):
    """The field of a param: its saved value and the typed text."""

    def __init__(self, key: str, value: Any) -> None:
        self.key, self.saved = key, value
        super().__init__(format_value(value), "empty", id=f"param-{key}", compact=True, select_on_focus=False)

    @property
    def edited(self) -> bool:
        return bool(self.typed_value != to_yaml_value(self.saved))

    @property
    def typed_value(self) -> Any:
        """The text as a value. Lists and mappings may be typed without brackets and braces."""
        if isinstance(self.saved, tuple):
            kind = type(self.saved[0]) if self.saved else str
            return [_parse_as(kind, name) for name in parse_names(self.value)]
        if isinstance(self.saved, Mapping):
            return parse_mapping(self.value)
        return _parse_as(type(self.saved), self.value)

    def update_saved(self, value: Any) -> None:
        """Set a new saved value; text that is being edited stays."""
        was_edited, self.saved = self.edited, value
        if not was_edited:
            self.value = format_value(value)

    def revert(self) -> None:
        self.value = format_value(self.saved)


def to_yaml_value(value: Any) -> Any:
    """The value with lists for tuples, also inside a mapping, as YAML loads it."""
    if isinstance(value, Mapping):
        return {key: to_yaml_value(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _parse_as(kind: type, text: str) -> Any:
    """The text as a `kind`, or unchanged if invalid. Numbers are Python's: in YAML, 023 is 19 and 1:30 is 90."""
    try:
        return yaml.safe_load(text) if kind is bool else kind(text.strip())
    except (yaml.YAMLError, ValueError):
        return text


def format_value(value: Any) -> str:
    if isinstance(value, Mapping):
        return dump_inline(to_yaml_value(value))[1:-1]
    if isinstance(value, tuple) and not all(isinstance(item, str) for item in value):
        return ", ".join(map(str, value))
    if isinstance(value, tuple):
        return ", ".join(
            name if _parse_list(f"{name}, x") == [name, "x"] else json.dumps(name, ensure_ascii=False) for name in value
        )
    return str(value).lower() if isinstance(value, bool) else str(value)


def parse_names(text: str) -> list[str]:
    """Split comma-separated names. Names may be quoted, as `"[INST]"` must be."""
    items = _parse_list(text)
    if len(items) == 1 and isinstance(items[0], list):  # the text has brackets
        items = items[0]
    if not items or not all(isinstance(name, str) for name in items):
        items = [name.strip() for name in text.split(",")]
    return [name for name in items if name]


def parse_mapping(text: str) -> Any:
    """`v_proj: 8, fc1: 2` or `rank: [1, 2]` as a mapping; any other text unchanged."""
    braced = text if text.strip().startswith("{") else f"{{{text}}}"
    try:
        items = yaml.safe_load(braced)
    except (yaml.YAMLError, ValueError):
        return text
    return _parse_scientific(items) if isinstance(items, dict) else text


def _parse_scientific(value: Any) -> Any:
    """Convert strings like 1e-3 to floats: PyYAML reads them as strings."""
    if isinstance(value, dict):
        return {key: _parse_scientific(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_parse_scientific(item) for item in value]
    return float(value) if isinstance(value, str) and SCIENTIFIC.fullmatch(value) else value


def _parse_list(text: str) -> list[Any]:
    """The items of a YAML list typed without brackets; empty if it is not one."""
    try:
        items = yaml.load(f"[{text}]", yaml.BaseLoader)  # reads all scalars as strings
    except yaml.YAMLError:
        return []
    return items if isinstance(items, list) else []


def param_order(section: Section) -> Sequence[str]:
    """Names of the stage's own params, then of those that all training stages share."""
    shared = hints(Training) if isinstance(section, Training) else {}
    return sorted(hints(type(section)), key=lambda name: name in shared)


class _Fields(VerticalScroll, can_focus=False):
    """Up and down move from field to field."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "move(-1)", "Param above", show=False),
        Binding("down", "move(1)", "Param below", show=False),
    ]

    def action_move(self, by: int) -> None:
        inputs = list(self.query(ParamInput))
        focused = self.screen.focused
        if isinstance(focused, ParamInput) and focused in inputs:
            self.screen.set_focus(inputs[min(max(inputs.index(focused) + by, 0), len(inputs) - 1)])

    def on_resize(self) -> None:
        """Keep the focused field visible when the text below takes some of the lines."""
        focused = self.screen.focused
        if isinstance(focused, ParamInput) and self in focused.ancestors:
            focused.scroll_visible(animate=False)


class ParamForm(Vertical):
    """Filled by `show`; posts `Saved` for a value to be written."""

    DEFAULT_CSS = """
    ParamForm { height: 1fr; }
    ParamForm _Fields { height: 1fr; }
    ParamForm Horizontal { height: 1; }
    ParamForm Label { width: 22; color: $text-muted; }
    ParamForm Input { width: 1fr; }
    ParamForm .-edited { text-style: italic; color: $warning; }
    ParamForm Input.-bad { color: $error; text-style: bold; }
    ParamForm #rule { height: auto; color: $text-muted; }
    """

    @dataclass
    class Saved(Message):
        """Enter was pressed in a field whose value differs from the file."""

        key: str
        value: Any

    def __init__(self, source: str) -> None:
        super().__init__()
        self._source = source  # the file's name, for messages
        self._section: Section | None = None
        self.stage = ""

    def compose(self) -> ComposeResult:
        yield _Fields()
        yield Static(id="rule")

    async def show(self, stage: str, section: Section) -> None:
        """Show the values of a stage's section; edited fields keep their text."""
        changed, self._section = section != self._section, section
        if stage != self.stage:
            await self._rebuild(stage, section)
        elif changed:
            for field in self.query(ParamInput):
                field.update_saved(getattr(section, field.key))
                self._mark(field)
                if field.has_focus:
                    self._explain(field)

    async def _rebuild(self, stage: str, section: Section) -> None:
        self.stage = stage
        rows = [Horizontal(Label(name), ParamInput(name, getattr(section, name))) for name in param_order(section)]
        with self.app.batch_update():
            await self.query(Horizontal).remove()
            await self.query_one(_Fields).mount_all(rows)
        self.query_one("#rule", Static).update("")

    def unsaved(self) -> Mapping[str, str]:
        """The text of edited fields, by key."""
        return {key_path(self.stage, field.key): field.value for field in self.query(ParamInput) if field.edited}

    def revert(self) -> None:
        """Reset all fields to the saved values."""
        for field in self.query(ParamInput):
            field.revert()
        self.query_one("#rule", Static).update("")

    @on(Input.Changed)
    def _input_changed(self, event: Input.Changed) -> None:
        event.stop()
        if isinstance(event.input, ParamInput) and event.input.is_attached:
            self._mark(event.input)
            if event.input.has_focus:
                self._explain(event.input)

    def on_descendant_focus(self) -> None:
        focused = self.screen.focused
        if isinstance(focused, ParamInput):
            self._explain(focused)

    @on(Input.Submitted)
    def _input_submitted(self, event: Input.Submitted) -> None:
        event.stop()
        field = event.input
        if isinstance(field, ParamInput) and field.edited and not self._problem(field):
            self.post_message(self.Saved(key_path(self.stage, field.key), field.typed_value))

    def _mark(self, field: ParamInput) -> None:
        field.set_class(field.edited, "-edited")
        field.set_class(field.edited and bool(self._problem(field)), "-bad")

    def _explain(self, field: ParamInput) -> None:
        """Show below the fields what is wrong, or which values are allowed."""
        if self._section is None or not hasattr(self._section, field.key):
            return
        problem = self._problem(field) if field.edited else ""
        text = problem or f"{field.key}: {rule(type(self._section), field.key)}"
        pending = "  Enter writes it, Escape takes it back." if field.edited and not problem else ""
        self.query_one("#rule", Static).update(f"{'✗ ' if problem else ''}{text}{pending}", layout=True)
        self.call_after_refresh(field.scroll_visible, animate=False)  # a longer text leaves fewer lines for the fields

    def _problem(self, field: ParamInput) -> str:
        if self._section is None or not hasattr(self._section, field.key):
            return ""  # a field of the previous stage, about to be removed
        try:
            check(self._section, self.stage, field.key, field.typed_value, self._source)
        except UserError as error:
            return str(error)
        return ""
