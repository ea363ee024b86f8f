"""The params of one stage, each in a field of its own: checked while one types, written on Enter."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
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
from pipeline.project.params.sections import Section, Training, check, key_path, rule

SCIENTIFIC = re.compile(r"[+-]?\d+(\.\d*)?e[+-]?\d+", re.IGNORECASE)


class ParamInput(Input):
    """One param: what the file says of it, and what is typed."""

    def __init__(self, key: str, value: Any) -> None:
        self.key, self.saved = key, value
        super().__init__(written(value), "empty", id=f"param-{key}", compact=True, select_on_focus=False)

    @property
    def edited(self) -> bool:
        return bool(self.typed != plain(self.saved))

    @property
    def typed(self) -> Any:
        """What the text means in the file; a list and a mapping may be written without brackets and braces."""
        if isinstance(self.saved, tuple):
            kind = type(self.saved[0]) if self.saved else str
            return [_as(kind, name) for name in names(self.value)]
        if isinstance(self.saved, Mapping):
            return pairs(self.value)
        return _as(type(self.saved), self.value)

    def renew(self, value: Any) -> None:
        """The file says something else; what is being typed stays."""
        kept, self.saved = self.edited, value
        if not kept:
            self.value = written(value)

    def revert(self) -> None:
        self.value = written(self.saved)


def plain(value: Any) -> Any:
    """As YAML has it: lists, also in a mapping, where the params have tuples."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _as(kind: type, text: str) -> Any:
    """The text as a value of `kind`, or as it is: int and float, not YAML's, where 023 is 19 and 1:30 is 90."""
    try:
        return yaml.safe_load(text) if kind is bool else kind(text.strip())
    except (yaml.YAMLError, ValueError):
        return text


def written(value: Any) -> str:
    if isinstance(value, Mapping):
        return dump_inline(plain(value))[1:-1]
    if isinstance(value, tuple) and not all(isinstance(item, str) for item in value):
        return ", ".join(map(str, value))
    if isinstance(value, tuple):
        return ", ".join(
            name if _listed(f"{name}, x") == [name, "x"] else json.dumps(name, ensure_ascii=False) for name in value
        )
    return str(value).lower() if isinstance(value, bool) else str(value)


def names(text: str) -> list[str]:
    """Those that are written with commas between them: quoted where they must be, as a token `"[INST]"` must."""
    found = _listed(text)
    if len(found) == 1 and isinstance(found[0], list):  # a list in its own brackets
        found = found[0]
    if not found or not all(isinstance(name, str) for name in found):
        found = [name.strip() for name in text.split(",")]
    return [name for name in found if name]


def pairs(text: str) -> Any:
    """`v_proj: 8, fc1: 2` or `rank: [1, 2]` as a mapping; a text that is none as it is."""
    braced = text if text.strip().startswith("{") else f"{{{text}}}"
    try:
        found = yaml.safe_load(braced)
    except (yaml.YAMLError, ValueError):
        return text
    return _numbers(found) if isinstance(found, dict) else text


def _numbers(value: Any) -> Any:
    """1e-3 is a number to who writes it; PyYAML takes it for a text."""
    if isinstance(value, dict):
        return {key: _numbers(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_numbers(item) for item in value]
    return float(value) if isinstance(value, str) and SCIENTIFIC.fullmatch(value) else value


def _listed(text: str) -> list[Any]:
    """The items of a YAML list without its brackets; none where it is no such list."""
    try:
        found = yaml.load(f"[{text}]", yaml.BaseLoader)  # all scalars are texts there
    except yaml.YAMLError:
        return []
    return found if isinstance(found, list) else []


def ordered(section: Section) -> Sequence[str]:
    """The stage's own params, then those that all training stages have."""
    shared = {f.name for f in fields(Training)} if isinstance(section, Training) else set()
    return sorted((f.name for f in fields(section)), key=lambda name: name in shared)


class _Fields(VerticalScroll, can_focus=False):
    """Up and down go from field to field, and what scrolls is what the field needs to be seen."""

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
        """Where the text below took some of the lines, the field that is edited stays in sight."""
        focused = self.screen.focused
        if isinstance(focused, ParamInput) and self in focused.ancestors:
            focused.scroll_visible(animate=False)


class ParamForm(Vertical):
    """`show` fills it; `Saved` asks for a value to be written."""

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
        """Enter was pressed in a field that holds another value than the file."""

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
        """The values of a stage's section; fields that are being edited keep what was typed."""
        changed, self._section = section != self._section, section
        if stage != self.stage:
            await self._rebuild(stage, section)
        elif changed:
            for field in self.query(ParamInput):
                field.renew(getattr(section, field.key))
                self._mark(field)
                if field.has_focus:
                    self._explain(field)

    async def _rebuild(self, stage: str, section: Section) -> None:
        self.stage = stage
        rows = [Horizontal(Label(name), ParamInput(name, getattr(section, name))) for name in ordered(section)]
        with self.app.batch_update():
            await self.query(Horizontal).remove()
            await self.query_one(_Fields).mount_all(rows)
        self.query_one("#rule", Static).update("")

    def unsaved(self) -> Mapping[str, str]:
        """What was typed and not written, by key."""
        return {key_path(self.stage, field.key): field.value for field in self.query(ParamInput) if field.edited}

    def revert(self) -> None:
        """Back to what the file says."""
        for field in self.query(ParamInput):
            field.revert()
        self.query_one("#rule", Static).update("")

    @on(Input.Changed)
    def _typed(self, event: Input.Changed) -> None:
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
    def _enter(self, event: Input.Submitted) -> None:
        event.stop()
        field = event.input
        if isinstance(field, ParamInput) and field.edited and not self._problem(field):
            self.post_message(self.Saved(key_path(self.stage, field.key), field.typed))

    def _mark(self, field: ParamInput) -> None:
        field.set_class(field.edited, "-edited")
        field.set_class(field.edited and bool(self._problem(field)), "-bad")

    def _explain(self, field: ParamInput) -> None:
        """Below the fields: what is wrong, or what the value must be."""
        if self._section is None or not hasattr(self._section, field.key):
            return
        problem = self._problem(field) if field.edited else ""
        said = problem or f"{field.key}: {rule(self._section, field.key)}"
        pending = "  Enter writes it, Escape takes it back." if field.edited and not problem else ""
        self.query_one("#rule", Static).update(f"{'✗ ' if problem else ''}{said}{pending}", layout=True)
        self.call_after_refresh(field.scroll_visible, animate=False)  # a longer text leaves the fields fewer lines

    def _problem(self, field: ParamInput) -> str:
        if self._section is None or not hasattr(self._section, field.key):
            return ""  # a field of the stage before, on its way out
        try:
            check(self._section, self.stage, field.key, field.typed, self._source)
        except UserError as error:
            return str(error)
        return ""
