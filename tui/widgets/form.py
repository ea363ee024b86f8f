"""A form made from declarations: a line per field, checked while typing; changed and invalid values
are marked.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import yaml
from rich.text import Text
from textual import on
from textual.app import ComposeResult, RenderResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.events import Click, Key
from textual.geometry import Region
from textual.message import Message
from textual.reactive import reactive
from textual.suggester import SuggestFromList
from textual.widget import Widget
from textual.widgets import Input, Label

from pipeline.project.params.edit import dump_inline

Kind = Literal["integer", "number", "boolean", "text", "choice", "list", "mapping", "files"]
Step = Callable[[str, int], str]  # (text, +1 or -1) → the next text


@dataclass(frozen=True)
class FormField:
    """A field of a form.

    `kind`: what the text stands for. A "choice" has one of `choices`, shown by its name in `names`;
    other fields suggest theirs while typing. `rule`: the valid values in words. `problem(value)`:
    what is wrong, or ""; it also gets texts that are no value of this kind. `step`: what page up
    and page down make of a text, if they step it.
    """

    key: str
    kind: Kind = "text"
    default: Any = ""
    label: str = ""
    rule: str = ""
    problem: Callable[[Any], str] | None = None
    choices: Sequence[str] = ()
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    items: Kind = "text"  # of a list
    step: Step | None = None
    placeholder: str = ""

    def parse(self, text: str) -> Any:
        """The text as a value, or unchanged if it is none. Lists and mappings need no brackets and
        braces.
        """
        if self.kind == "list":
            return [_parse_scalar(self.items, item) for item in parse_names(text)]
        if self.kind == "files":
            return parse_files(text)
        return parse_mapping(text) if self.kind == "mapping" else _parse_scalar(self.kind, text)


class _YamlLoader(yaml.SafeLoader):
    """Reads 1e-3 as a number: PyYAML takes it for a text."""


_SCIENTIFIC = re.compile(r"[+-]?\d+(\.\d*)?e[+-]?\d+$", re.IGNORECASE)
_YamlLoader.add_implicit_resolver("tag:yaml.org,2002:float", _SCIENTIFIC, list("+-0123456789"))


def _parse_scalar(kind: Kind, text: str) -> Any:
    """Numbers are Python's: in YAML, 023 is 19 and 1:30 is 90."""
    try:
        if kind == "boolean":
            return yaml.safe_load(text)
        return {"integer": int, "number": float}.get(kind, str)(text.strip())
    except (yaml.YAMLError, ValueError):
        return text


def parse_names(text: str) -> list[str]:
    """Split comma-separated names. Names may be quoted, as `"[INST]"` must be."""
    items = _parse_list(text)
    if len(items) == 1 and isinstance(items[0], list):  # the text has brackets
        items = items[0]
    if not items or not all(isinstance(name, str) for name in items):
        items = [name.strip() for name in text.split(",")]
    return [name for name in items if name]


def parse_files(text: str) -> Any:
    """A path, or several as a list: each a path, or a mapping such as `{path: a.csv, weight:
    2}`.
    """
    items = _parse_list(text)
    for item in items:
        if isinstance(item, dict) and isinstance(item.get("weight"), str):
            item["weight"] = _parse_scalar("number", item["weight"])
    return items if len(items) > 1 or (items and isinstance(items[0], dict)) else text.strip()


def _parse_list(text: str) -> list[Any]:
    """The items of a YAML list typed without brackets; empty if it is not one."""
    try:
        items = yaml.load(f"[{text}]", yaml.BaseLoader)  # reads all scalars as strings
    except yaml.YAMLError:
        return []
    return items if isinstance(items, list) else []


def parse_mapping(text: str) -> Any:
    """`v_proj: 8, fc1: 2` or `rank: [1, 2]` as a mapping, `{…}, {…}` as a list of them; any other
    text unchanged.
    """
    try:
        if text.strip().startswith("{"):
            items = yaml.load(f"[{text}]", _YamlLoader)
            return items[0] if len(items) == 1 else items
        items = yaml.load(f"{{{text}}}", _YamlLoader)
    except (yaml.YAMLError, ValueError):
        return text
    return items if isinstance(items, dict) else text


def format_value(value: Any) -> str:
    """A value as it is typed into a form."""
    if isinstance(value, Mapping):
        return dump_inline(to_yaml_value(value))[1:-1]
    if isinstance(value, tuple):
        return ", ".join(map(_format_item, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _format_item(item: Any) -> str:
    """An item of a list, quoted if it would be read as something else."""
    if isinstance(item, Mapping):
        return dump_inline(to_yaml_value(item))
    plain = not isinstance(item, str) or _parse_list(f"{item}, x") == [item, "x"]
    return str(item) if plain else json.dumps(item, ensure_ascii=False)


def to_yaml_value(value: Any) -> Any:
    """The value with lists for tuples, also inside a mapping, as YAML loads it."""
    if isinstance(value, Mapping):
        return {key: to_yaml_value(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def counting(text: str, by: int) -> str:
    """1, 2, 3, …; anything that is not a number becomes 1."""
    return str(max(1, int(text) + by)) if text.isdecimal() and len(text) < 12 else "1"


def doubling(text: str, by: int) -> str:
    """1, 2, 4, 8, …: the next power of two above or below."""
    if not text.isdecimal() or len(text) >= 12:
        return "1"
    number = int(text)
    return str(
        1 << number.bit_length() if by > 0 else max(1, 1 << max(0, (number - 1).bit_length() - 1))
    )


def cycling(values: Sequence[str]) -> Step:
    """Cycle through `values`; any other text goes to the first."""
    return lambda text, by: (
        values[(values.index(text) + by) % len(values)] if text in values else values[0]
    )


STEP_KEYS: list[BindingType] = [
    Binding("pagedown", "step(1)", "The field's next value", show=False),
    Binding("pageup", "step(-1)", "The field's value before", show=False),
]


class FieldInput(Input):
    """A field to type into. Page up and page down step the value; + and - too if it is a number
    that steps.
    """

    BINDINGS: ClassVar[list[BindingType]] = STEP_KEYS

    def __init__(self, field: FormField, value: str, select_on_focus: bool) -> None:
        suggester = SuggestFromList(field.choices, case_sensitive=False) if field.choices else None
        super().__init__(
            value,
            field.placeholder,
            id=field.key,
            compact=True,
            suggester=suggester,
            select_on_focus=select_on_focus,
        )
        self.field = field

    def refresh(
        self, *regions: Region, repaint: bool = True, layout: bool = False, recompose: bool = False
    ) -> Self:
        """Skip the layout of the whole screen that Input does at every key: this field never
        changes its size.
        """
        return super().refresh(
            *regions, repaint=repaint, layout=layout and not self.is_mounted, recompose=recompose
        )

    async def _on_key(self, event: Key) -> None:
        if self.field.step in (counting, doubling) and event.character in ("+", "-"):
            event.stop()
            event.prevent_default()
            self.action_step(1 if event.character == "+" else -1)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Without steps, page up and page down scroll the form."""
        return (
            self.field.step is not None
            if action == "step"
            else super().check_action(action, parameters)
        )

    def action_step(self, by: int) -> None:
        if self.field.step:
            self.value = self.field.step(self.value.strip() or self.placeholder, by)
            self.cursor_position = len(self.value)


class Choice(Widget, can_focus=True):
    """`‹ lora ›`: left, right or a click steps to another value.

    Not Textual's Select, which opens a list at up and down: here these go to other fields, and a
    step is one key. It is also five widgets a field: eight of them take 110 ms to start, eight of
    these 52.
    """

    DEFAULT_CSS = """
    Choice { height: 1; width: 1fr; }
    Choice:focus { background: $block-cursor-background; color: $block-cursor-foreground; text-style: bold; }
    Choice:disabled { color: $text-disabled; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("right,plus", "step(1)", "Next value", show=False),
        Binding("left,minus", "step(-1)", "Value before", show=False),
        *STEP_KEYS,
    ]
    value: reactive[str] = reactive("", init=False)

    @dataclass
    class Changed(Message):
        """The value changed."""

        choice: "Choice"

        @property
        def control(self) -> "Choice":
            return self.choice

    def __init__(self, field: FormField, value: str) -> None:
        super().__init__(id=field.key)
        self.field = field
        self.set_reactive(Choice.value, self.validate_value(value))

    def validate_value(self, value: str) -> str:
        """An unknown value selects the first."""
        return value if value in self.field.choices else self.field.choices[0]

    def watch_value(self) -> None:
        self.post_message(self.Changed(self))

    def render(self) -> RenderResult:
        return Text(
            f"‹ {self.field.names.get(self.value, self.value)} ›", no_wrap=True, overflow="ellipsis"
        )

    def action_step(self, by: int) -> None:
        self.value = cycling(self.field.choices)(self.value, by)

    def on_click(self, event: Click) -> None:
        self.action_step(-1 if event.x < 2 else 1)


class Form(Vertical):
    """A line per field: a label, and an editor whose id is the field's key. Up and down move from
    field to field.

    `editors` holds the texts; `value` parses one. A line has the class `-edited` while its value
    differs from the given one, and `-bad` while it is invalid. `fill` and `revert` set values.
    """

    DEFAULT_CSS = "Form { height: auto; } Form .field { height: 1; }"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "move(-1)", "Field above", show=False),
        Binding("down", "move(1)", "Field below", show=False),
        Binding("ctrl+b", "reset", "Back to the field's default", show=False),
    ]

    class Changed(Message):
        """The text of a field changed, or of any number of them by `fill`."""

    @dataclass
    class Submitted(Message):
        """Enter was pressed in a field."""

        key: str

    def __init__(
        self,
        fields: Sequence[FormField] = (),
        values: Mapping[str, Any] | None = None,
        select_on_focus: bool = True,
    ) -> None:
        super().__init__()
        self._select_on_focus = select_on_focus
        self.lines = self._make_lines(fields, values or {})

    def _make_lines(
        self, fields: Sequence[FormField], values: Mapping[str, Any]
    ) -> dict[str, Horizontal]:
        self.fields = {field.key: field for field in fields}
        self.given = {field.key: values.get(field.key, field.default) for field in fields}
        self.editors: dict[str, FieldInput | Choice] = {}
        for key, field in self.fields.items():
            text = format_value(self.given[key])
            is_choice = field.kind == "choice"
            self.editors[key] = (
                Choice(field, text) if is_choice else FieldInput(field, text, self._select_on_focus)
            )
        return {
            key: Horizontal(
                Label(self.label(field)), *self.beside(field), classes="field", id=f"field-{key}"
            )
            for key, field in self.fields.items()
        }

    def compose(self) -> ComposeResult:
        yield from self.lines.values()

    def beside(self, field: FormField) -> Iterable[Widget]:
        """The widgets beside a label, among them the editor."""
        return (self.editors[field.key],)

    def label(self, field: FormField, invalid: bool = False) -> str:  # noqa: ARG002  # for a form that shows it
        return field.label or field.key

    def fill(self, values: Mapping[str, Any]) -> None:
        """Set all fields, and post a single Changed."""
        self.given = dict(values)
        with self.prevent(Input.Changed, Choice.Changed):
            self.revert()
        for key in self.fields:
            self._mark(key)
        self.post_message(self.Changed())

    def revert(self) -> None:
        """Reset all fields to the given values."""
        for key, editor in self.editors.items():
            editor.value = format_value(self.given[key])

    def value(self, key: str) -> Any:
        return self.fields[key].parse(self.editors[key].value)

    def edited(self, key: str) -> bool:
        return bool(self.value(key) != to_yaml_value(self.given[key]))

    def problem(self, key: str) -> str:
        """What is wrong with the value of a field, or ""."""
        problem = self.fields[key].problem
        return problem(self.value(key)) if problem else ""

    def set_bad(self, key: str, bad: bool) -> None:
        """Mark a field as invalid; for those that declare a `problem` the form does it."""
        line = self.lines[key]
        if line.has_class("-bad") != bad:
            line.set_class(bad, "-bad")
            line.query_one(Label).update(self.label(self.fields[key], bad))

    def _mark(self, key: str) -> None:
        edited = self.edited(key)
        self.lines[key].set_class(edited, "-edited")
        if self.fields[key].problem:
            self.set_bad(key, edited and bool(self.problem(key)))

    @on(Input.Changed)
    @on(Choice.Changed)
    def _text_changed(self, event: Input.Changed | Choice.Changed) -> None:
        event.stop()
        self._mark(event.control.id or "")
        self.post_message(self.Changed())

    @on(Input.Submitted)
    def _input_submitted(self, event: Input.Submitted) -> None:
        event.stop()
        self.post_message(self.Submitted(event.input.id or ""))

    @property
    def focused_key(self) -> str:
        """The key of the field with the focus, or ""."""
        focused = self.screen.focused
        return next((key for key, editor in self.editors.items() if editor is focused), "")

    def action_reset(self) -> None:
        if key := self.focused_key:
            self.editors[key].value = format_value(self.fields[key].default)

    def action_move(self, by: int) -> None:
        keys = [key for key in self.editors if self.lines[key].display]
        if self.focused_key in keys:
            index = min(max(keys.index(self.focused_key) + by, 0), len(keys) - 1)
            self.screen.set_focus(self.editors[keys[index]])
