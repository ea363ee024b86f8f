"""The curves screen: the loss of every run over its steps, live, and the list of runs."""

import asyncio
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from time import monotonic, process_time
from typing import ClassVar, Literal

from rich.text import Text
from textual import on, work
from textual.binding import Binding, BindingType
from textual.color import Color
from textual.containers import Vertical, VerticalScroll
from textual.widget import Widget
from textual.widgets import Static

from pipeline.files.artifact import write_file
from pipeline.files.text import printable
from pipeline.project.logs.run_log import OPTIONAL
from tui.screens.base import WorkbenchScreen
from tui.screens.curves.runs import Line, Runs
from tui.screens.curves.series import FACTS, QUANTITIES
from tui.widgets.colors import readable
from tui.widgets.line_chart import LossChart, Range, View, range_of
from tui.widgets.text import KeyedList

EMPTY = "No runs yet: press 1 then r, or type `make repro`."
SMOOTHING = 0.9  # initial
SMOOTHINGS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
POLL = 0.5  # seconds between checks of the files
CPU_SHARE = 0.03  # of a core for drawing a live chart, since training needs the rest
MAX_DELAY = 2.0  # seconds after which it is drawn anyway
EXPORT_COLUMNS = 600  # columns of an exported chart
TITLES = {
    "loss": "loss (nats per token)",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "reward_margin": "reward margin, chosen − rejected",
    "reward_accuracy": "share of pairs whose chosen answer has the higher reward",
    "divergence": "divergence from the base (nats per token)",
}
INDENT = 6
OPENS = "enter lists them"
MAX_NAME = 44  # characters of an adapter's name in the list, at most


class RunList(KeyedList):
    """Legend, status and switches of the runs; below an expanded sweep, its adapters. Option ids are their keys."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space", "select", "Show or hide the run", id="curves.toggle", show=False),
        Binding("enter", "screen.open", "Show or hide the run; list a sweep's adapters", id="curves.open", show=False),
    ]
    DEFAULT_CSS = """
    RunList { scrollbar-size-vertical: 1; background: $background; }
    RunList:focus { background: $background; }
    """

    def __init__(self) -> None:
        super().__init__()
        self._runs: Runs | None = None
        self._expanded: Collection[str] = ()
        self.sweeps: dict[str, str] = {}  # key of a sweep or of an adapter → key of its sweep

    def show_runs(self, runs: Runs, expanded: Collection[str]) -> None:
        """A line per run, and below each expanded sweep one per adapter, the names padded to one width."""
        self._runs, self._expanded = runs, expanded
        option, sweeps, lines = self.highlighted_option, self.sweeps, dict[str, Text]()
        self.sweeps = {}
        for key, view in runs.views.items():
            on, look, label = key in runs.shown, runs.looks[key], view.run.label
            facts = view.facts() if on else [view.state]  # a hidden run is not read, so its numbers would be old
            if view.run.sweeps:
                self.sweeps[key] = key
                label = f"{'▾' if key in expanded else '▸'} {label}"
                if key not in expanded:
                    facts.insert(2, OPENS)
            lines[key] = self._line("[x] " if on else "[ ] ", look.sign, look.color, label, facts, bold=on)
            if key in self.sweeps and key in expanded:
                width = min(max(map(len, view.curve_logs)), MAX_NAME)
                for name, log in view.curve_logs.items():
                    adapter, sign = view.adapter_key(log), look.sign if log is view.best else " "
                    label = f"{name if len(name) <= width else f'{name[: width - 1]}…':{width}}"
                    self.sweeps[adapter] = key
                    lines[adapter] = self._line(" " * INDENT, sign, look.color, label, view.facts_of(log))
        # The highlight of an adapter that is no longer listed moves to its sweep.
        self.show(lines, sweeps.get(str(option.id), "") if option else "")

    def _line(self, box: str, sign: str, color: str, label: str, facts: Sequence[str], bold: bool = False) -> Text:
        """Facts that do not fit are wrapped to further lines."""
        color = readable(Color.parse(color), self.background_colors[1]).hex
        lines = [Text.assemble(box, (sign, color), " ", (label, "bold" if bold else ""))]
        width = max(self.size.width - 1, 40)
        for fact in facts:
            if lines[-1].cell_len + 2 + len(fact) > width and lines[-1].cell_len > INDENT:
                lines.append(Text(" " * (INDENT - 2)))
            lines[-1].append(f"  {fact}", "" if len(lines) == 1 else "dim")
        return Text("\n").join(lines)

    def on_resize(self) -> None:
        """Wrap the lines again."""
        if self._runs:
            self.show_runs(self._runs, self._expanded)


@dataclass(frozen=True)
class Window:
    """The visible ranges. `x` None: all steps; `y` None: all values. `following`: `x` moves with the newest step."""

    x: Range | None = None
    y: Range | None = None
    log: bool = False
    following: bool = True
    cursor: float | None = None


class CurvesScreen(WorkbenchScreen):
    """Connects files, charts and the list of runs."""

    NAME: ClassVar[str] = "curves"
    CSS_PATH = "curves.tcss"
    AUTO_FOCUS = "#loss"
    VERTICAL_BREAKPOINTS = [(0, "-short"), (36, "-tall")]  # noqa: RUF012  # as Textual declares it
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("l", "log", "Log", id="curves.log"),
        Binding("f", "follow", "Follow", id="curves.follow"),
        Binding("c", "cursor", "Cursor", id="curves.cursor"),
        Binding("r", "panel('learning_rate')", "Rate", id="curves.learning_rate"),
        Binding("g", "panel('grad_norm')", "Gradient", id="curves.grad_norm"),
        Binding("m", "panel('reward_margin')", "Margin", id="curves.reward_margin"),
        Binding("a", "panel('reward_accuracy')", "Accuracy", id="curves.reward_accuracy"),
        Binding("d", "panel('divergence')", "Divergence", id="curves.divergence"),
        Binding("s", "samples", "Samples", id="curves.samples"),
        Binding("x", "export", "Export", id="curves.export"),
        Binding("right_square_bracket", "smooth(1)", "Smooth more", id="curves.smooth_more", show=False),
        Binding("left_square_bracket", "smooth(-1)", "Smooth less", id="curves.smooth_less", show=False),
        Binding("plus,equals_sign", "zoom(0.7)", "Zoom in", id="curves.zoom_in", show=False),
        # 1.43 takes a step of 0.7 back.
        Binding("minus", "zoom(1.43)", "Zoom out", id="curves.zoom_out", show=False),
        Binding("y", "zoom(1, 0.7)", "Zoom in on the values", id="curves.zoom_values_in", show=False),
        Binding("Y", "zoom(1, 1.43)", "Zoom out of the values", id="curves.zoom_values_out", show=False),
        Binding("left", "sideways(-1)", "Earlier steps, or the cursor to the left", id="curves.left", show=False),
        Binding("right", "sideways(1)", "Later steps, or the cursor to the right", id="curves.right", show=False),
        Binding("up", "pan(0, 0.1)", "Greater values", id="curves.up", show=False),
        Binding("down", "pan(0, -0.1)", "Smaller values", id="curves.down", show=False),
        Binding("0,home", "reset", "All steps, all values, follow", id="curves.reset", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.window = Window()
        self.runs = Runs(self.workbench.root, self.workbench.params_path, SMOOTHING)
        self._panels: dict[str, bool] = {}  # toggled by the user; the others are shown if there is room
        self._opened: set[str] = set()  # sweeps whose adapters are listed
        self._pointed = ""  # the highlighted adapter
        self._reading = False
        self._offered: list[str] = []  # what the footer offers of panels and samples
        self._samples_shown = False
        self._drawn_at = self._cpu_time = 0.0  # wall-clock and CPU seconds at the last redraw

    def body(self) -> Iterable[Widget]:
        with Vertical(id="charts"):
            for name in QUANTITIES:
                yield LossChart(TITLES[name], id=name)
        with VerticalScroll(id="samples"):
            yield Static()
        yield Static(id="mode")
        yield RunList()
        yield Static(EMPTY, id="nothing")

    def on_mount(self) -> None:
        self.set_interval(POLL, self._poll)

    def on_screen_resume(self) -> None:
        self._poll()

    # Reading files

    def _poll(self) -> None:
        """Check everything that may have changed: os.stat, and the small run states of live runs."""
        if self.is_current and not self._reading:
            self._read()

    @work
    async def _read(self) -> None:
        self._reading = True
        try:
            rediscovered = await self.runs.rediscover()
            state_changes = [view.poll_state() for view in self.runs.views.values()]
            if rediscovered or any(state_changes):
                self.runs.show_default()
            # Read and draw only while that stays within CPU_SHARE, or if the last time is MAX_DELAY ago.
            since = monotonic() - self._drawn_at
            due = rediscovered or since > MAX_DELAY or process_time() - self._cpu_time < CPU_SHARE * since
            changed = [view for _, view in self.runs.visible() if due and view.changed()]
            for view in changed:
                await view.read()
            if rediscovered or changed:
                self.redraw()
            elif any(state_changes):
                self._update_list()
        finally:
            self._reading = False

    # Drawing

    def redraw(self) -> None:
        """Draw every chart, the status line and the list. Does nothing before the first search for runs."""
        if self.runs.stamp is None:
            return
        self._drawn_at, self._cpu_time = monotonic(), process_time()
        first_run = self.has_class("-empty") and bool(self.runs.views)
        self.set_class(not self.runs.views, "-empty")
        if first_run and self.focused is None:  # the chart lost the focus when it was hidden
            self.give_focus(self._chart)
        self.set_class(any(map(self._panel_shown, QUANTITIES[1:])), "-panel")
        lines, x = self.runs.lines(self._pointed), self._step_range()
        for chart in self.query(LossChart):
            name = str(chart.id)
            chart.display = name == "loss" or self._panel_shown(name)
            if chart.display:
                loss = name == "loss"
                view = View(x, self.window.y if loss else None, loss and self.window.log, self.window.cursor)
                chart.draw([line.curve(name, x, chart.columns) for line in lines], view)
        samples = self.query_one("#samples")
        samples.display = self._samples_shown and self.runs.has_answers()
        if samples.display:
            samples.query_one(Static).update(samples_text(lines, self.window.cursor))
        self.query_one("#mode", Static).update(status_line(self.window, self.runs.smoothing, lines))
        self._update_list()
        # refresh_bindings rebuilds the footer, so not at every redraw
        offered = [name for name in QUANTITIES if self.runs.has_values(name)] + ["samples"] * self.runs.has_answers()
        if self._offered != offered:
            self._offered = offered
            self.refresh_bindings()

    def _step_range(self) -> Range:
        """The visible steps: all, the window's, or as many up to the newest step."""
        steps = [log.steps for _, view in self.runs.visible() for log in view.logs if log.steps]
        first, last = (min(s[0] for s in steps), max(s[-1] for s in steps)) if steps else (0.0, 1.0)
        if self.window.x is None:
            return (first, last) if first < last else (first - 1, last + 1)
        return (last - (self.window.x[1] - self.window.x[0]), last) if self.window.following else self.window.x

    def _panel_shown(self, name: str) -> bool:
        """As the user said, else if there is room: of preferences their panels in place of rate and gradient."""
        wanted = self.has_class("-tall") and (name in OPTIONAL or not self.runs.has_values("reward_margin"))
        return self._panels.get(name, wanted) and self.runs.has_values(name)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action == "panel":
            return self.runs.has_values(str(parameters[0]))
        if action == "samples":
            return self.runs.has_answers()
        return super().check_action(action, parameters)

    def _update_list(self) -> None:
        self.query_one(RunList).show_runs(self.runs, self._opened)

    # User input

    @on(RunList.OptionSelected)
    def _selected(self, event: RunList.OptionSelected) -> None:
        key = str(event.option_id)
        self._toggle(self.query_one(RunList).sweeps.get(key, key))  # for an adapter, its whole sweep

    def _toggle(self, run: str) -> None:
        self.runs.toggle(run)
        self.redraw()
        self._drawn_at = 0.0  # so that a run that is switched on is read and drawn at once
        self._poll()

    def action_open(self) -> None:
        """Expand or collapse a sweep; show or hide any other run."""
        runs = self.query_one(RunList)
        sweep = runs.sweeps.get(str(runs.highlighted_option.id)) if runs.highlighted_option else None
        if sweep is None:
            runs.action_select()
            return
        self._opened ^= {sweep}
        if sweep in self._opened and sweep not in self.runs.shown:
            self._toggle(sweep)  # hidden runs are not read, so its adapters would have no numbers
        else:
            self.redraw()

    @on(RunList.OptionHighlighted)
    def _highlighted(self, event: RunList.OptionHighlighted) -> None:
        key = str(event.option_id)
        adapter = key if key not in self.runs.views else ""
        if adapter != self._pointed:
            self._pointed = adapter
            self.redraw()

    @on(LossChart.Moved)
    def _moved(self, event: LossChart.Moved) -> None:
        """Freeze at the new ranges. The panels always fit their values."""
        y = event.y if event.chart.id == "loss" and event.y != event.chart.shown.y else self.window.y
        self._set_window(x=event.x, y=y, following=False)

    @on(LossChart.Clicked)
    def _clicked(self, event: LossChart.Clicked) -> None:
        self._set_window(cursor=round(event.step))

    @on(LossChart.Resized)
    def _resized(self) -> None:
        self.redraw()

    def _set_window(self, **change: object) -> None:
        self.window = replace(self.window, **change)  # type: ignore[arg-type]
        self.redraw()

    @property
    def _chart(self) -> LossChart:
        return self.query_one("#loss", LossChart)

    def action_log(self) -> None:
        self._set_window(log=not self.window.log, y=None)

    def action_follow(self) -> None:
        self._set_window(following=True, y=None)

    def action_reset(self) -> None:
        self._set_window(x=None, y=None, following=True)

    def action_cursor(self) -> None:
        self._set_window(cursor=round(sum(self._step_range()) / 2) if self.window.cursor is None else None)

    def action_sideways(self, direction: int) -> None:
        """Move the cursor by a column, at least by a step; without a cursor, pan."""
        if self.window.cursor is None:
            self._chart.pan(0.1 * direction)
            return
        first, last = self._step_range()
        by = max(round((last - first) * 2 / self._chart.columns), 1)
        self._set_window(cursor=min(max(self.window.cursor + by * direction, round(first)), round(last)))

    def action_pan(self, x: float, y: float) -> None:
        self._chart.pan(x, y)

    def action_zoom(self, x: float, y: float = 1.0) -> None:
        self._chart.zoom(x, y)

    def action_panel(self, name: str) -> None:
        """Show or hide a panel; a short terminal has room for one only."""
        visible = not self._panel_shown(name)
        if visible and self.has_class("-short"):
            self._panels = dict.fromkeys(TITLES, False)
        self._panels[name] = visible
        self.redraw()

    def action_samples(self) -> None:
        """Show or hide what the runs answer, at the cursor or at their newest step."""
        self._samples_shown = not self._samples_shown
        self.redraw()

    def action_smooth(self, direction: Literal[-1, 1]) -> None:
        index = min(max(SMOOTHINGS.index(self.runs.smoothing) + direction, 0), len(SMOOTHINGS) - 1)
        if self.runs.smoothing != SMOOTHINGS[index]:
            self.runs.smooth(SMOOTHINGS[index])
            self.redraw()

    # Export

    @work
    async def action_export(self) -> None:
        from tui.screens.curves import export  # its dialog's widgets are imported when it is first opened

        views = [view for _, view in self.runs.visible()]
        if not any(log.steps for view in views for log in view.logs):
            hint = "switch a run on in the list below" if self.runs.views else "there are no runs yet"
            self.warn(f"There is nothing to export: {hint}.")
            return
        stem = f"curves-{views[0].run.stage}" if len(views) == 1 else "curves"
        path = await self.app.push_screen_wait(export.ExportScreen(self.workbench.root, stem))
        if path is None:
            return
        with self.workbench.errors_shown():
            if path.suffix.lower() == ".csv":
                logs = [
                    (view.run.curve_label(curve_log.name), curve_log.log)
                    for _, view in self.runs.visible()
                    for curve_log in view.curve_logs.values()
                ]
                chunks = export.csv_lines(logs)
            else:
                chunks = iter([await export.render_chart(self._chart_data(path.suffix[1:].lower()))])
            await asyncio.to_thread(write_file, path, chunks, durable=True)
            self.workbench.log_message(f"Exported to {path}.")

    def _chart_data(self, kind: str) -> dict[str, object]:
        """The visible charts, at a higher resolution."""
        from tui.screens.curves.export import panel

        lines, x, panels = self.runs.lines(), self._step_range(), []
        labels = [line.label for line in lines]
        for chart in self.query(LossChart):
            if not chart.display:
                continue
            name, log = str(chart.id), chart.id == "loss" and self.window.log
            curves = [line.curve(name, x, EXPORT_COLUMNS) for line in lines]
            y = self.window.y if name == "loss" else None
            if y is None and not log and any(curve.stray for curve in curves):
                y = range_of(curves)
            panels.append(panel(TITLES[name], labels, curves, y, log))
        return {"format": kind, "title": f"smoothing {self.runs.smoothing:g}", "x": x, "panels": panels}


def samples_text(shown: Sequence[Line], cursor: float | None) -> Text:
    """The answers of each run, and of a sweep's best and highlighted adapter: at the cursor, or the newest."""
    text = Text()
    for line in shown:
        answers = [] if line.dim else line.curve_log.answers_at(cursor)
        if not answers:
            continue
        name = line.view.run.curve_label(line.curve_log.name)
        text.append(f"{line.look.sign} {name}, step {answers[0].step:,}\n", "bold")
        for sample in answers:
            answer = "(not finite)" if sample.answer is None else printable(sample.answer)
            text.append(f"  {printable(sample.prompt)} ", "dim").append(f"→ {answer}\n")
    text.rstrip()
    return text


def status_line(window: Window, smoothing: float, shown: list[Line]) -> Text:
    """Following or frozen, scale, smoothing; with a cursor, a second line with the values of each run."""
    parts = ["following" if window.following else "frozen: f follows again"]
    parts += ["log" if window.log else "linear", f"smoothing {smoothing:g}"]
    if window.log and any(min(line.curve_log.log.series["loss"].y, default=1) <= 0 for line in shown):
        parts.append("values of 0 or less are not shown on a log axis")
    text = Text(" · ".join(parts))
    if window.cursor is None:
        return text
    text.append(f"\nstep {window.cursor:,.0f}:", "bold")
    for line in shown:
        if line.dim:
            continue
        text.append(f"  {line.look.sign} {f'{line.curve_log.name} ' if line.curve_log.name else ''}")
        log = line.curve_log.log
        index = log.index_at(window.cursor)
        if index is None or not log.steps[0] <= window.cursor <= log.steps[-1]:
            text.append("–")
            continue
        loss = log.series["loss"]
        text.append(f"{loss.y[index]:.4g} (smoothed {loss.smooth[index]:.4g})")
        for name, label in FACTS.items():
            if (value := log.series[name].value_at(window.cursor)) is not None:
                text.append(f", {label} {value:.4g}")
    return text
