"""A form for the params of a stage: values are checked while typing and saved on Enter."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args, get_origin

from textual import on
from textual.app import ComposeResult
from textual.containers import Vertical, VerticalScroll
from textual.events import DescendantFocus
from textual.message import Message
from textual.widgets import Static

from pipeline.errors import UserError
from pipeline.project.params.load import check, key_path
from pipeline.project.params.schema import Section, hints, rule, value_type
from pipeline.project.params.sections import AdapterTraining, Training
from tui.widgets.form import Form, FormField, Kind

# A choice is typed here, as a text: its letters would else be keys of the screen, such as r, which runs all.
KINDS: Mapping[Any, Kind] = {
    **{bool: "boolean", int: "integer", float: "number", str: "text", Literal: "text"},
    **{tuple: "list", Mapping: "mapping"},
}


def fields_of(stage: str, section: Section, source: str) -> list[FormField]:
    """The fields of a stage's own params, then of those that adapters share, then of those that all training shares."""

    def problem(key: str, value: Any) -> str:
        try:
            check(section, stage, key, value, source)
        except UserError as error:
            return str(error)
        return ""

    kind, fields = type(section), []
    defaults, bases = kind(), [hints(base) for base in (Training, AdapterTraining) if isinstance(section, base)]
    for key in sorted(hints(kind), key=lambda key: sum(key in base for base in bases)):
        hint = value_type(kind, key)
        origin, arguments = get_origin(hint), get_args(hint)
        fields.append(
            FormField(
                key,
                KINDS.get(origin or hint, "text"),
                getattr(defaults, key),
                rule=rule(kind, key),
                problem=partial(problem, key),
                choices=arguments if origin is Literal else (),
                items=KINDS.get(arguments[0], "text") if origin is tuple else "text",
                placeholder="empty",
            )
        )
    return fields


class Scroll(VerticalScroll, can_focus=False):
    """Keeps the focused field visible when a longer text below leaves fewer lines: its resize does not bubble."""

    def on_resize(self) -> None:
        focused = self.screen.focused
        if focused and self in focused.ancestors:
            focused.scroll_visible(animate=False)


class ParamForm(Vertical):
    """Filled by `show`; posts `Saved` for a value to be written."""

    DEFAULT_CSS = """
    ParamForm, ParamForm VerticalScroll { height: 1fr; }
    ParamForm Label { width: 22; color: $text-muted; }
    ParamForm Input { width: 1fr; }
    ParamForm .-edited Input { text-style: italic; color: $warning; }
    ParamForm .-bad Input { color: $error; text-style: bold; }
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
        self.form = Form(select_on_focus=False)

    def compose(self) -> ComposeResult:
        yield Scroll(self.form)
        yield Static(id="rule", markup=False)

    async def show(self, stage: str, section: Section) -> None:
        """Show the values of a stage's section; edited fields keep their text."""
        if (stage, section) == (self.stage, self._section):
            return
        fields, same_stage = fields_of(stage, section, self._source), stage == self.stage
        values = {field.key: getattr(section, field.key) for field in fields}
        self.stage, self._section = stage, section
        if same_stage:
            self.form.show(fields, values)
            self._explain()
        else:
            self._set_rule("")
            await self.form.rebuild(fields, values)

    def unsaved(self) -> Mapping[str, str]:
        """The text of edited fields, by key."""
        form = self.form
        return {key_path(self.stage, key): form.editors[key].value for key in form.fields if form.edited(key)}

    def revert(self) -> None:
        """Reset all fields to the saved values."""
        self.form.revert()
        self._set_rule("")

    @on(Form.Submitted)
    def _submitted(self, event: Form.Submitted) -> None:
        if self.form.edited(event.key) and not self.form.problem(event.key):
            self.post_message(self.Saved(key_path(self.stage, event.key), self.form.value(event.key)))

    @on(Form.Changed)
    @on(DescendantFocus)
    def _explain(self) -> None:
        """Show below the fields what is wrong with the focused one, or which values are allowed."""
        key = self.form.focused_key
        if not key:
            return
        edited, problem = self.form.edited(key), self.form.problem(key) if self.form.edited(key) else ""
        pending = "  Enter writes it, Escape takes it back." if edited and not problem else ""
        self._set_rule(f"✗ {problem}" if problem else f"{key}: {self.form.fields[key].rule}{pending}")
        self.call_after_refresh(self.form.editors[key].scroll_visible, animate=False)

    def _set_rule(self, text: str) -> None:
        self.query_one("#rule", Static).update(text)
