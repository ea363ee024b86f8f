"""The pipeline screen's panels: the stages' states, the form of params, the output of a run, changed metrics."""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from rich.table import Table
from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.containers import Vertical, VerticalScroll
from textual.events import DescendantFocus, Resize
from textual.geometry import Region
from textual.widgets import RichLog, Static

from pipeline.errors import UserError
from pipeline.files.file_tail import FileTail
from pipeline.project.params.load import check, key_path
from pipeline.project.params.schema import Section, hints, rule, value_type
from pipeline.project.params.sections import AdapterTraining, Training
from pipeline.project.status import MetricChange, StageState
from tui.screens.pipeline.dag import SIGNS
from tui.widgets.form import Form, FormField, Kind
from tui.widgets.text import KeyedList, duration

STATE_TEXT = {"current": "up to date", "missing": "not made yet", "waits": "will run again"}
NAME_WIDTH = len("finetune_freeze")  # of the design card's stages; longer names move their line to the right
BAR = 8  # cells of a progress bar
MAX_READ = 64 * 1024  # bytes of a log per read: of a stage that prints 100 MB only the end is shown
LINES = 1000


class StageList(KeyedList):
    """The stages that a project can read, in the order of the DAG: state, reasons, and progress while running."""

    DEFAULT_CSS = "StageList { background: transparent; text-wrap: nowrap; text-overflow: ellipsis; }"
    _states: Mapping[str, StageState] = {}

    def choose(self, stage: str) -> None:
        """Highlight a stage."""
        self.highlighted = self.get_option_index(stage)

    def show_states(self, stages: Iterable[str], states: Mapping[str, StageState]) -> None:
        """A line per stage. A stage that starts to run scrolls into view; the cursor stays."""
        before, self._states = self._states, states
        self.show({name: _format_line(name, states.get(name)) for name in stages})
        for index, option in enumerate(self.options):
            now, then = (known.get(str(option.id)) for known in (states, before))
            if now and now.state == "running" and not (then and then.state == "running"):
                self.call_after_refresh(self.scroll_to_region, Region(0, index, 1, 1), animate=False)


def _format_line(name: str, state: StageState | None) -> Text:
    line = Text(no_wrap=True, overflow="ellipsis")
    if state is None:
        return line.append("· ", "dim").append(f"{name:{NAME_WIDTH}}  ").append("…", "dim")
    sign, style = SIGNS[state.state]
    line.append(f"{sign} ", style).append(f"{name:{NAME_WIDTH}}  ")
    if state.state != "running":
        reasons = f": {', '.join(state.reasons)}" if state.reasons else ""
        return line.append(Text(STATE_TEXT.get(state.state, state.state), style).append(reasons, "default"))
    run = state.run
    if run is None or not run.total:
        return line.append("running: starting", style)
    share = run.done / run.total
    filled = round(share * BAR)
    bar = "━" * filled + "╌" * (BAR - filled)
    left = "" if run.eta is None else f"  {duration(run.eta)} left"
    return line.append(f"{bar} {share:4.0%}  {run.done:,}/{run.total:,}  {run.text}{left}", style)


class LogView(RichLog):
    """Shows the last LINES lines of a growing file; `follow` reads what is new."""

    DEFAULT_CSS = "LogView { height: 1fr; background: transparent; }"

    def __init__(self) -> None:
        super().__init__(max_lines=LINES, wrap=True, min_width=20)
        self._tail: FileTail[Text] | None = None

    def on_resize(self, event: Resize) -> None:  # noqa: ARG002  # RichLog's handler runs as well
        """Read the file again: lines are wrapped for the width at which they were written."""
        self._tail = None

    def follow(self, path: Path) -> None:
        if not self.size.width:  # hidden: RichLog would queue the lines until it has a width
            return
        if self._tail is None:
            self.clear()
            self._tail = FileTail(path, lambda _: _render_line, header=False, latest=MAX_READ)
        if self._tail.changed():
            chunk = self._tail.read()
            if chunk.change:
                self.clear()
            for line in chunk.rows:
                self.write(line)


def _render_line(line: str) -> Text:
    """The line as a terminal shows it: only what follows its last carriage return."""
    return Text.from_ansi(line.rstrip("\r").rpartition("\r")[2][:2000])


def metrics_table(changes: list[MetricChange]) -> Table | Text:
    """A table of each changed metric: committed, now, difference."""
    if not changes:
        return Text("As in the last commit.")
    rows = Table.grid(padding=(0, 2))
    rows.add_column()
    for _ in range(3):
        rows.add_column(justify="right")
    rows.add_row("", *(Text(title, "dim") for title in ("committed", "now", "difference")))
    for change in changes:
        both = change.before is not None and change.after is not None
        difference = f"{(change.after or 0) - (change.before or 0):+.4g}" if both else ""
        values = (f"{value:,.6g}" if value is not None else "–" for value in (change.before, change.after))
        rows.add_row(change.name, *values, difference)
    return rows


# A choice is typed here, as a text: its letters would else be keys of the screen, such as r, which runs all.
KINDS: Mapping[Any, Kind] = {
    **{bool: "boolean", int: "integer", float: "number", str: "text", Literal: "text"},
    **{tuple: "list", Mapping: "mapping", UnionType: "files"},
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
        if origin is UnionType and str not in arguments:  # a mapping, or a list of them
            origin = Mapping
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
    """The params of a stage, filled by `show`; below them what is wrong with the focused one, or its rule."""

    DEFAULT_CSS = """
    ParamForm, ParamForm VerticalScroll { height: 1fr; }
    ParamForm Label { width: 22; color: $text-muted; }
    ParamForm Input { width: 1fr; }
    ParamForm .-edited Input { text-style: italic; color: $warning; }
    ParamForm .-bad Input { color: $error; text-style: bold; }
    ParamForm #rule { height: auto; color: $text-muted; }
    """

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
