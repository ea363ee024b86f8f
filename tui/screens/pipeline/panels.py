"""What the pipeline screen shows of the stages as lists: their states, the output of a run, changed metrics."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from rich.table import Table
from rich.text import Text
from textual.events import Resize
from textual.geometry import Region
from textual.widgets import RichLog

from pipeline.project.status import MetricChange, StageState
from tui.screens.pipeline.dag import SIGNS
from tui.services.file_tail import FileTail
from tui.widgets.keyed_list import KeyedList
from tui.widgets.text import duration

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


def metrics_table(changes: list[MetricChange] | str) -> Table | Text:
    """A table of each changed metric: committed, now, difference. A string is shown as it is."""
    if isinstance(changes, str):
        return Text(changes, "dim")
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
