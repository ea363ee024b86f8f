"""The pane of a stage's params: a list with a cursor, the meaning of the param below it, a field to
edit its value.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from rich.cells import cell_len
from textual import on
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.events import Click
from textual.geometry import Region
from textual.message import Message
from textual.suggester import SuggestFromList
from textual.widget import Widget
from textual.widgets import Input, Static

from pipeline.project.params.load import key_path
from tui.screens.pipeline.params import Line, Param, group_key, lines_of
from tui.screens.pipeline.tree import MUTED
from tui.widgets.form import cycling, format_value, to_yaml_value
from tui.widgets.pane import Pane
from tui.widgets.table import VIM_KEYS
from tui.widgets.text import pad_or_truncate

CURSOR = {
    True: "$block-cursor-foreground on $block-cursor-background",
    False: "on $block-cursor-blurred-background",
}
MAX_NAMES = 24  # cells of the names' column
HUGE_BOUND = re.compile(r", (below|at most) \d{10,}")  # of a rule: nobody comes near it
ALL = 9999  # lines to move to reach an end


class ValueField(Input):
    """The field over the value that is edited; up and down step through the values that a choice
    has.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "submit", "write", id="pipeline.write"),
        Binding("escape", "screen.leave", "keep as it was", id="pipeline.keep"),
        Binding("up", "step(-1)", "Value before", show=False),
        Binding("down", "step(1)", "Next value", show=False),
    ]
    choices: Sequence[str] = ()

    def __init__(self) -> None:
        super().__init__(compact=True, id="value", placeholder="empty")

    def action_step(self, by: int) -> None:
        if self.choices:
            self.value = cycling(self.choices)(self.value.strip(), by)
            self.cursor_position = len(self.value)


class ParamList(VerticalScroll, can_focus=True):
    """The lines as one text. The cursor's line is followed by what its param means."""

    DEFAULT_CSS = """
    ParamList { height: 1fr; scrollbar-gutter: stable; }
    ParamList Static { height: auto; width: 1fr; text-wrap: nowrap; }
    ParamList #value { position: absolute; width: 10; height: 1; display: none; background: $boost; }
    ParamList #value.-open { display: block; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        *VIM_KEYS,
        Binding("up", "cursor_up", "Up", show=False),
        Binding("down", "cursor_down", "Down", show=False),
        Binding("pageup", "move(-10)", "Page up", show=False),
        Binding("pagedown", "move(10)", "Page down", show=False),
        Binding("home,g", f"move(-{ALL})", "First", show=False),
        Binding("end,G", f"move({ALL})", "Last", show=False),
    ]

    class Moved(Message):
        """The cursor is on another line, or was clicked where it is."""

        def __init__(self, again: bool = False) -> None:
            super().__init__()
            self.again = again

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[Line] = []
        self.cursor = 0
        self.below: list[Content] = []  # what is said below the cursor's line
        self._tops: list[int] = []  # the first row of each line
        self._height = 0

    def compose(self) -> Iterable[Widget]:
        yield Static()
        yield ValueField()

    @property
    def current(self) -> Line | None:
        return self.lines[self.cursor] if self.cursor < len(self.lines) else None

    @property
    def names(self) -> int:
        """The width of the names' column."""
        return min(MAX_NAMES, max((len(line.key) for line in self.lines), default=0))

    def on_focus(self) -> None:
        self.draw()

    def on_blur(self) -> None:
        self.draw()

    def on_resize(self) -> None:
        self.post_message(self.Moved())  # what is below is wrapped for the width

    def draw(self) -> None:
        """Draw all lines. The list is short, and as one text it takes a millisecond."""
        width = max(self.scrollable_content_region.width, 20)
        rows: list[Content] = []
        self._tops = []
        has_focus = self.has_focus or self.query_one(ValueField).has_focus
        for number, line in enumerate(self.lines):
            self._tops.append(len(rows))
            row = self._draw_line(line, width)
            rows.append(row.stylize(CURSOR[has_focus]) if number == self.cursor else row)
            if number == self.cursor:
                rows += self.below
        text = self.query_one(Static)
        text.update(Content("\n").join(rows), layout=len(rows) != self._height)
        self._height = len(rows)

    def _draw_line(self, line: Line, width: int) -> Content:
        param, names = line.param, self.names
        if param is None:
            sign = "▾" if line.unfolded else "▸"
            return Content(f"{sign} {line.group} ({line.size})").truncate(width, pad=True)
        name = f"{'  ' if line.group else ''}{param.key}"
        was = "" if param.made is None else f"● was {param.made or 'empty'}"
        room = max(width - 3 - names - (min(cell_len(was), 24) + 1 if was else 0), 4)
        value = format_value(param.value) or "–"
        plain = Content.assemble(
            ("● " if was else "  ", "$text-warning"),
            f"{pad_or_truncate(name, names)} ",
            (
                pad_or_truncate(value, min(room, max(cell_len(value), 6))),
                MUTED if param.is_default else "",
            ),
        )
        text = (
            Content.assemble(plain, (f" {was.removeprefix('● ')}", "$text-warning"))
            if was
            else plain
        )
        return text.truncate(width, ellipsis=True, pad=True)

    def show_cursor(self) -> None:
        """Scroll so that the cursor's line and what is below it are seen."""
        if self.cursor < len(self._tops):
            top, rows = self._tops[self.cursor], 1 + len(self.below)
            region = Region(0, top, 1, min(rows, max(self.size.height, 1)))
            self.call_after_refresh(self.scroll_to_region, region, animate=False, force=True)

    def field_region(self) -> Region:
        """Where the value of the cursor's line is drawn."""
        left = 3 + self.names
        top = self._tops[self.cursor] if self.cursor < len(self._tops) else 0
        return Region(left, top, max(self.scrollable_content_region.width - left, 6), 1)

    def action_cursor_up(self) -> None:
        self.action_move(-1)

    def action_cursor_down(self) -> None:
        self.action_move(1)

    def action_move(self, by: int) -> None:
        before, self.cursor = (
            self.cursor,
            min(max(self.cursor + by, 0), max(len(self.lines) - 1, 0)),
        )
        if before != self.cursor:
            self.post_message(self.Moved())

    def on_click(self, event: Click) -> None:
        if event.widget is not self.query_one(Static):
            return
        row = next(
            (
                number
                for number in reversed(range(len(self._tops)))
                if self._tops[number] <= event.y
            ),
            0,
        )
        again, self.cursor = row == self.cursor, row
        self.post_message(self.Moved(again))


class ParamsPane(Pane):
    """Shows the params of a stage and writes none: the screen gets `Submitted`, and calls `written`
    if it succeeded.
    """

    TITLE = "Params"
    FILTER = True
    HELP = """\
The settings of the stage that the cursor is on. **●** was another value when its artifact was
made: the stage runs again with the new one. Then come those that params.yaml sets, the others of
this stage (grey: their defaults), and groups of settings that all training shares. Below the
cursor: what the param means (the comment in params.yaml, if it has one), the valid values, and
where its value is set.

**Enter** edits the value in place, checked while you type; ↑ ↓ step through the values that a
choice has. **Enter** again writes it to params.yaml (comments and layout stay), **Esc** keeps it
as it was, **z** takes a write back. **Space**, ← → fold a group. **/** finds a param in all groups
by its name, value or meaning."""
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter,e", "act", "edit", id="pipeline.edit"),
        Binding("space", "toggle_group", "Fold or unfold the group", show=False),
        Binding("left", "fold(False)", "Fold the group", show=False),
        Binding("right", "fold(True)", "Unfold the group", show=False),
    ]

    @dataclass
    class Submitted(Message):
        """A valid value that differs from the file's was confirmed."""

        param: Param
        text: str

    @dataclass
    class Lost(Message):
        """The cursor left a value that was typed and not written."""

        text: str

    def __init__(self) -> None:
        super().__init__(id="params")
        self.stage, self.params = "", list[Param]()
        self.unfolded = set[str]()
        self.edited: Param | None = None

    def contents(self) -> Iterable[Widget]:
        yield ParamList()

    @property
    def list(self) -> ParamList:
        return self.query_one(ParamList)

    @property
    def field(self) -> ValueField:
        return self.query_one(ValueField)

    def show(self, stage: str, params: Sequence[Param]) -> None:
        """Show the params of a stage; the cursor, the order and what is being typed stay if it is
        the same stage.
        """
        is_same = stage == self.stage
        if is_same:
            now = {param.key: param for param in params}
            params = [
                replace(now[old.key], group=old.group) for old in self.params if old.key in now
            ]
            if _equal(params, self.params):
                return
        if self.edited:
            again = next(
                (param for param in params if is_same and param.key == self.edited.key), None
            )
            if again:
                self.edited = again
            else:
                self.lose_edit()
        if not is_same:
            self.list.cursor = 0
            self.list.scroll_home(animate=False)
        self.stage, self.params = stage, [*params]
        self._rebuild()

    def select(self, key: str) -> None:
        """Move the cursor to a param, and unfold its group."""
        param = next((param for param in self.params if param.key == key), None)
        if param is None:
            return
        if not param.matches(self.filter_text):
            self.close_filter()
        self.unfolded |= {param.group} if param.made is None else set()
        self._rebuild(key)

    def filtered(self, text: str) -> None:
        self._rebuild(text=text)

    def _rebuild(self, key: str = "", text: str | None = None) -> None:
        rows, current = self.list, self.list.current
        key = key or (current.key if current else "")
        rows.lines = lines_of(
            self.params, self.unfolded, self.filter_text if text is None else text
        )
        keys = [line.key for line in rows.lines]
        rows.cursor = keys.index(key) if key in keys else min(rows.cursor, max(len(keys) - 1, 0))
        changed = sum(param.made is not None for param in self.params)
        self.show_title(*[f"{changed} changed"] * bool(changed))
        self._explain()

    # The cursor and what is said below it

    @on(ParamList.Moved)
    def _moved(self, event: ParamList.Moved) -> None:
        event.stop()
        current = self.list.current
        if self.edited and (current is None or current.param is not self.edited):
            self.lose_edit()
        self._explain()
        if event.again:
            self.action_act()

    def _explain(self) -> None:
        """Write below the cursor's line what its param means, or what is wrong with what is being
        typed.
        """
        rows, line = self.list, self.list.current
        texts: list[Content] = []
        if line and line.param and rows.size.width:
            param, field = line.param, line.param.field
            if param is self.edited:
                value = field.parse(self.field.value)
                problem = field.problem(value) if field.problem and self.is_edited else ""
                key, before = (
                    key_path(self.stage, param.key),
                    format_value(param.value) or "it empty",
                )
                pending = Content.styled(f"Enter writes {key}, Esc keeps {before}.")
                texts = (
                    [Content.styled(f"✗ {problem}", "$text-error")]
                    if problem
                    else [pending] * self.is_edited
                )
            texts.append(Content.styled(param.meaning, MUTED))
            texts.append(
                Content.styled(f"{HUGE_BOUND.sub('', field.rule)} · {_source(param)}", MUTED)
            )
        width = max(rows.scrollable_content_region.width - 4, 16)
        wrapped = [part for text in texts if text.plain for part in text.wrap(width)]
        rows.below = [Content.assemble("    ", part) for part in wrapped]
        rows.draw()
        rows.show_cursor()
        self._place_field()

    # Editing

    @property
    def is_edited(self) -> bool:
        """Whether what is typed stands for another value than the file's."""
        param = self.edited
        return param is not None and bool(
            param.field.parse(self.field.value) != to_yaml_value(param.value)
        )

    def unsaved(self) -> str:
        """The param that is being edited and what was typed: `finetune_lora.rank: 16`; "" if
        nothing.
        """
        return (
            f"{key_path(self.stage, self.edited.key)}: {self.field.value}"
            if self.edited and self.is_edited
            else ""
        )

    def action_act(self) -> None:
        """Edit the param that the cursor is on, or fold or unfold the group."""
        line = self.list.current
        if line is None:
            return
        if line.param is None:
            self.action_toggle_group()
            return
        field, self.edited = self.field, line.param
        field.choices = line.param.field.choices
        field.suggester = (
            SuggestFromList(field.choices, case_sensitive=False) if field.choices else None
        )
        field.value = format_value(line.param.value)
        field.add_class("-open")
        self._explain()
        self.app.stylesheet.update(self.screen)  # keys already typed are meant for the field
        self.screen.set_focus(field)

    def _place_field(self) -> None:
        if self.edited:
            region = self.list.field_region()
            self.field.styles.offset = (region.x, region.y)
            self.field.styles.width = region.width

    def leave_edit(self) -> None:
        """Close the field; the list has the focus that it had."""
        had_focus = self.field.has_focus
        self.edited = None
        if had_focus:
            self.screen.set_focus(self.list)
        self.field.remove_class("-open")
        self._explain()

    def lose_edit(self) -> None:
        """Close the field because something else is shown, and say what was not written."""
        if lost := self.unsaved():
            self.post_message(self.Lost(lost))
        self.leave_edit()

    @on(Input.Changed, "#value")
    def _typed(self, event: Input.Changed) -> None:
        event.stop()
        if self.edited:
            self._explain()

    @on(Input.Submitted, "#value")
    def _submitted(self, event: Input.Submitted) -> None:
        event.stop()
        param = self.edited
        if param is None:
            return
        if not self.is_edited:
            self.leave_edit()
        elif not (param.field.problem and param.field.problem(param.field.parse(event.value))):
            self.post_message(self.Submitted(param, event.value))

    # Groups

    def action_toggle_group(self) -> None:
        if (line := self.list.current) and line.group:
            self._fold(line.group, line.group not in self.unfolded)

    def action_fold(self, unfold: bool) -> None:
        if (line := self.list.current) and line.group:
            self._fold(line.group, unfold)

    def _fold(self, group: str, unfold: bool) -> None:
        (self.unfolded.add if unfold else self.unfolded.discard)(group)
        self._rebuild(group_key(group))


def _equal(one: Sequence[Param], other: Sequence[Param]) -> bool:
    """Whether both show the same; a field's check is another object each time."""

    def shown(param: Param) -> tuple[object, ...]:
        return param.key, format_value(param.value), param.made, param.meaning, param.source

    return [shown(param) for param in one] == [shown(param) for param in other]


def _source(param: Param) -> str:
    """Where a value is set, in words."""
    file, _, block = param.source.partition(", ")
    if param.is_default:
        return f"the {param.source}"
    return f"set in {file}, block {block}" if block else f"set in {file}"
