"""The params of one stage, each in a field of its own: checked while one types, written on Enter."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import yaml
from textual import on
from textual.app import ComposeResult
from textual.containers import Horizontal, VerticalScroll
from textual.message import Message
from textual.widgets import Input, Label, Static

from pipeline.errors import UserError
from pipeline.params import Section, rule

Check = Callable[[str, Any], None]  # raises UserError for a value that key must not have


class ParamForm(VerticalScroll):
    """`show` fills it; `Saved` asks for a value to be written."""

    DEFAULT_CSS = """
    ParamForm { height: 1fr; }
    ParamForm Horizontal { height: 1; }
    ParamForm Label { width: 18; color: $text-muted; }
    ParamForm Input { width: 1fr; }
    ParamForm .-edited { text-style: italic; color: $warning; }
    ParamForm Input.-bad { color: $error; text-style: bold; }
    ParamForm #rule { dock: bottom; height: auto; color: $text-muted; }
    """

    @dataclass
    class Saved(Message):
        """Enter was pressed in a field that holds another value than the file."""

        key: str
        value: Any

    def __init__(self, check: Check) -> None:
        super().__init__(can_focus=False)
        self._check = check
        self._section: Section | None = None
        self._name = ""
        self._texts: dict[str, str] = {}

    def compose(self) -> ComposeResult:
        yield Static(id="rule")

    async def show(self, name: str, section: Section) -> None:
        """The values of a section; fields that are being edited keep what was typed."""
        if name != self._name:
            await self._rebuild(name, section)
        elif section != self._section:
            for key, text in _texts(section).items():
                field = self.query_one(f"#param-{key}", Input)
                if field.value == self._texts[key]:
                    field.value = text
                self._texts[key] = text
                self._mark(field)
        self._section = section

    async def _rebuild(self, name: str, section: Section) -> None:
        self._name, self._section, self._texts = name, section, _texts(section)
        with self.app.batch_update():
            await self.query(Horizontal).remove()
            rows = [
                Horizontal(Label(key), Input(text, id=f"param-{key}", compact=True, select_on_focus=False))
                for key, text in self._texts.items()
            ]
            await self.mount_all(rows)
        self.query_one("#rule", Static).update("")

    def unsaved(self) -> Mapping[str, str]:
        """What was typed and not written, by key."""
        return {f"{self._name}.{_key(field)}": field.value for field in self.query(Input) if self._edited(field)}

    def _edited(self, field: Input) -> bool:
        return field.value != self._texts[_key(field)]

    def revert(self) -> None:
        """Back to what the file says."""
        for field in self.query(Input):
            field.value = self._texts[_key(field)]

    @on(Input.Changed)
    def _typed(self, event: Input.Changed) -> None:
        event.stop()
        self._mark(event.input)
        if event.input.has_focus:
            self._explain(event.input)

    def on_descendant_focus(self) -> None:
        focused = self.screen.focused
        if isinstance(focused, Input):
            self._explain(focused)

    @on(Input.Submitted)
    def _enter(self, event: Input.Submitted) -> None:
        event.stop()
        if self._edited(event.input) and not self._problem(event.input):
            self.post_message(self.Saved(f"{self._name}.{_key(event.input)}", self._value(event.input)))

    def _mark(self, field: Input) -> None:
        edited = self._edited(field)
        field.set_class(edited, "-edited")
        field.set_class(edited and bool(self._problem(field)), "-bad")

    def _explain(self, field: Input) -> None:
        """Below the fields: what is wrong, or what the value must be."""
        assert self._section is not None
        problem = self._problem(field) if self._edited(field) else ""
        said = problem or f"{_key(field)}: {rule(self._section, _key(field))}"
        pending = "  Enter writes it, Escape takes it back." if self._edited(field) and not problem else ""
        self.query_one("#rule", Static).update(f"{'✗ ' if problem else ''}{said}{pending}", layout=True)

    def _problem(self, field: Input) -> str:
        try:
            self._check(f"{self._name}.{_key(field)}", self._value(field))
        except UserError as error:
            return str(error)
        return ""

    def _value(self, field: Input) -> Any:
        """What the text means in the file; names of a list may be written with commas alone."""
        old = getattr(self._section, _key(field))
        if isinstance(old, tuple):
            return [name.strip() for name in field.value.strip(" []").split(",") if name.strip()]
        try:
            return yaml.safe_load(field.value)
        except (yaml.YAMLError, ValueError):
            return field.value


def _key(field: Input) -> str:
    return str(field.id).removeprefix("param-")


def _texts(section: Section) -> dict[str, str]:
    return {f.name: _text(getattr(section, f.name)) for f in fields(section)}


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)
