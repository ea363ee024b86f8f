"""The curves screen: every run's loss over its steps, live, beside the runs before it."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic, process_time
from typing import ClassVar, Literal

from rich.text import Text
from textual import on, work
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.widget import Widget
from textual.widgets import Static

from pipeline.errors import UserError
from tui import export
from tui.runs import Runs
from tui.screens.base import WorkbenchScreen
from tui.series import QUANTITIES
from tui.shown import TITLES, curve, legend, reading, values
from tui.watch import Watched
from tui.widgets.curve import Curve, Range, View
from tui.widgets.loss_chart import LossChart
from tui.widgets.run_list import Row, RunList

EMPTY = "No runs yet: press 1 then r, or type `make repro`."
SMOOTHING = 0.9  # at first
SMOOTHINGS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
POLL = 0.5  # seconds between two looks at the files
SHARE, LATEST = 0.03, 2.0  # of a core for a live picture; where that is little, seconds until it is drawn anyway
PRINTED = 600  # columns of an exported picture


@dataclass(frozen=True)
class Window:
    """What is looked at. `x` None: all steps; `y` None: all values. Following: `x` moves on with the newest step."""

    x: Range | None = None
    y: Range | None = None
    log: bool = False
    following: bool = True
    cursor: float | None = None


class CurvesScreen(WorkbenchScreen):
    """Connects the files, the charts and the list of runs."""

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
        Binding("d", "panel('divergence')", "Divergence", id="curves.divergence"),
        Binding("x", "export", "Export", id="curves.export"),
        Binding("right_square_bracket", "smooth(1)", "Smooth more", id="curves.smooth_more", show=False),
        Binding("left_square_bracket", "smooth(-1)", "Smooth less", id="curves.smooth_less", show=False),
        Binding("plus,equals_sign", "zoom(0.7)", "Zoom in", id="curves.zoom_in", show=False),
        Binding("minus", "zoom(1.43)", "Zoom out", id="curves.zoom_out", show=False),
        Binding("y", "zoom_values(0.7)", "Zoom in on the values", id="curves.zoom_values_in", show=False),
        Binding("Y", "zoom_values(1.43)", "Zoom out of the values", id="curves.zoom_values_out", show=False),
        Binding("left", "sideways(-1)", "Earlier steps, or the cursor to the left", id="curves.left", show=False),
        Binding("right", "sideways(1)", "Later steps, or the cursor to the right", id="curves.right", show=False),
        Binding("up", "pan_values(0.1)", "Greater values", id="curves.up", show=False),
        Binding("down", "pan_values(-0.1)", "Smaller values", id="curves.down", show=False),
        Binding("0,home", "reset", "All steps, all values, follow", id="curves.reset", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.window = Window()
        self.runs = Runs(self.workbench.root, self.workbench.params_path, SMOOTHING)
        self._panels: dict[str, bool] = {}  # as the user has switched them; else shown where there is room
        self._reading = False
        self._drawn_at = self._spent = 0.0  # seconds of the clock and of this process, at the last picture

    def body(self) -> Iterable[Widget]:
        with Vertical(id="charts"):
            for name in QUANTITIES:
                yield LossChart(TITLES[name], id=name)
        yield Static(id="mode")
        yield RunList()
        yield Static(EMPTY, id="nothing")

    def on_mount(self) -> None:
        self._timer = self.set_interval(POLL, self._poll)
        self._poll()

    def on_screen_suspend(self) -> None:
        self._timer.pause()

    def on_screen_resume(self) -> None:
        self._timer.resume()
        self._poll()

    # What the files say

    def _poll(self) -> None:
        """A look at everything that may have changed: os.stat, and the small journals of live runs."""
        if not self._reading:
            self._read()

    @work
    async def _read(self) -> None:
        self._reading = True
        try:
            found = await self.runs.rediscover()
            spoke = [watched.look() for watched in self.runs.watched.values()]
            if found or any(spoke):
                self.runs.show_default()
            due = found or self._due()
            changed = [watched for _, watched in self.runs.drawn() if due and watched.changed()]
            for watched in changed:
                await watched.read()
            if found or changed:
                self.redraw()
            elif any(spoke):
                self._list()
        finally:
            self._reading = False

    def _due(self) -> bool:
        """Whether a new picture keeps this process within its share: training needs the core."""
        since = monotonic() - self._drawn_at
        return since > LATEST or process_time() - self._spent < SHARE * since

    # What is drawn

    def redraw(self) -> None:
        """Every chart, the line below and the list, from what was read."""
        self._drawn_at, self._spent = monotonic(), process_time()
        self.set_class(not self.runs.watched, "-empty")
        self.set_class(any(map(self._panel_shown, QUANTITIES[1:])), "-panel")
        drawn, x = self.runs.drawn(), self._x()
        for chart in self.query(LossChart):
            name = str(chart.id)
            chart.display = name == "loss" or self._panel_shown(name)
            if chart.display:
                loss = name == "loss"
                view = View(x, self.window.y if loss else None, loss and self.window.log, self.window.cursor)
                chart.draw([self._curve(key, watched, name, x, chart.columns) for key, watched in drawn], view)
        self._mode()
        self._list()
        self.refresh_bindings()

    def _curve(self, key: str, watched: Watched, name: str, x: Range, columns: int) -> Curve:
        return curve(watched, self.runs.looks[key], name, x, columns)

    def _x(self) -> Range:
        """The steps shown: all, those of the window, or as many as in the window up to the newest."""
        steps = [w.log.steps for _, w in self.runs.drawn() if w.log.steps]
        first, last = (min(s[0] for s in steps), max(s[-1] for s in steps)) if steps else (0.0, 1.0)
        if self.window.x is None:
            return (first, last) if first < last else (first - 1, last + 1)
        if not self.window.following:
            return self.window.x
        return last - (self.window.x[1] - self.window.x[0]), last

    def _panel_shown(self, name: str) -> bool:
        return self._panels.get(name, self.has_class("-tall")) and self._has(name)

    def _has(self, name: str) -> bool:
        """Whether a run that is shown has any of it: divergence is measured only where it is asked for."""
        return name != "divergence" or any(watched.log.series[name].y for _, watched in self.runs.drawn())

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action == "panel":
            return self._has(str(parameters[0]))
        return super().check_action(action, parameters)

    def _mode(self) -> None:
        """One line: following or frozen, the scale, the smoothing; with the cursor, what each run has there."""
        window = self.window
        parts = ["following" if window.following else "frozen: f follows again"]
        parts += ["log" if window.log else "linear", f"smoothing {self.runs.smoothing:g}"]
        if window.log and any(min(w.log.series["loss"].y, default=1) <= 0 for _, w in self.runs.drawn()):
            parts.append("values of 0 or less have no place on a log axis")
        line = Text(" · ".join(parts))
        if window.cursor is not None:
            line.append(f"\nstep {window.cursor:,.0f}:", "bold")
            for key, watched in self.runs.drawn():
                line.append(f"  {self.runs.looks[key].sign} {reading(watched, window.cursor)}")
        self.query_one("#mode", Static).update(line)

    def _list(self) -> None:
        rows = []
        for key, watched in self.runs.watched.items():
            on, look = key in self.runs.shown, self.runs.looks[key]
            facts = watched.facts() if on else [watched.state]
            rows.append(Row(key, on, look.sign, look.color, watched.run.label, facts))
        self.query_one(RunList).show(rows)

    # What the user does

    @on(RunList.Toggled)
    def _toggle(self, event: RunList.Toggled) -> None:
        self.runs.toggle(event.key)
        self.redraw()
        self._drawn_at = 0.0  # what is switched on is read and drawn at once
        self._poll()

    @on(LossChart.Moved)
    def _moved(self, event: LossChart.Moved) -> None:
        """Zoomed or panned: frozen there. The panels' values always fit."""
        y = event.y if event.chart.id == "loss" and event.y != event.chart.shown.y else self.window.y
        self._look_at(x=event.x, y=y, following=False)

    @on(LossChart.Clicked)
    def _clicked(self, event: LossChart.Clicked) -> None:
        self._look_at(cursor=round(event.step))

    @on(LossChart.Resized)
    def _resized(self) -> None:
        self.redraw()

    def _look_at(self, **change: object) -> None:
        self.window = replace(self.window, **change)  # type: ignore[arg-type]
        self.redraw()

    @property
    def _chart(self) -> LossChart:
        return self.query_one("#loss", LossChart)

    def action_log(self) -> None:
        self._look_at(log=not self.window.log, y=None)

    def action_follow(self) -> None:
        self._look_at(following=True, y=None)

    def action_reset(self) -> None:
        self._look_at(x=None, y=None, following=True)

    def action_cursor(self) -> None:
        self._look_at(cursor=round(sum(self._x()) / 2) if self.window.cursor is None else None)

    def action_sideways(self, direction: int) -> None:
        """With the cursor on, it moves by a column, at least by a step; else the picture does."""
        if self.window.cursor is None:
            self._chart.pan(0.1 * direction)
            return
        first, last = self._x()
        by = max(round((last - first) * 2 / self._chart.columns), 1)
        self._look_at(cursor=min(max(self.window.cursor + by * direction, round(first)), round(last)))

    def action_pan_values(self, part: float) -> None:
        self._chart.pan(0, part)

    def action_zoom(self, factor: float) -> None:
        self._chart.zoom(factor)

    def action_zoom_values(self, factor: float) -> None:
        self._chart.zoom(1, factor)

    def action_panel(self, name: str) -> None:
        """Show or hide a panel; on a low terminal there is room for one of them."""
        wanted = not self._panel_shown(name)
        if wanted and self.has_class("-short"):
            self._panels = dict.fromkeys(TITLES, False)
        self._panels[name] = wanted
        self.redraw()

    def action_smooth(self, direction: Literal[-1, 1]) -> None:
        place = min(max(SMOOTHINGS.index(self.runs.smoothing) + direction, 0), len(SMOOTHINGS) - 1)
        if self.runs.smoothing != SMOOTHINGS[place]:
            self.runs.smooth(SMOOTHINGS[place])
            self.redraw()

    # What leaves the screen

    def action_export(self) -> None:
        from tui.screens.export import ExportScreen

        drawn = self.runs.drawn()
        if not any(watched.log.steps for _, watched in drawn):
            hint = "switch a run on in the list below" if self.runs.watched else "there are no runs yet"
            self.workbench.say(f"There is nothing to export: {hint}.", "warning")
            return
        stem = f"curves-{drawn[0][1].run.stage}" if len(drawn) == 1 else "curves"
        self.workbench.push_screen(ExportScreen(self.workbench.root, stem), self._chosen_path)

    def _chosen_path(self, path: Path | None) -> None:
        if path is not None:
            self._export(path)

    @work
    async def _export(self, path: Path) -> None:
        try:
            if path.suffix.lower() == ".csv":
                logs = [(watched.run.label, watched.log) for _, watched in self.runs.drawn()]
                pieces = export.csv_lines(logs)
            else:
                pieces = iter([await export.drawn(self._picture(path.suffix[1:].lower()))])
            await asyncio.to_thread(export.save, path, pieces)
        except (UserError, OSError) as error:
            self.workbench.fail(error)
        else:
            self.workbench.say(f"Written: {path}")

    def _picture(self, kind: str) -> dict[str, object]:
        """What is on the screen, in more columns."""
        drawn, x, panels = self.runs.drawn(), self._x(), []
        for chart in self.query(LossChart):
            if chart.display:
                name, log = str(chart.id), chart.id == "loss" and self.window.log
                curves = [self._curve(key, watched, name, x, PRINTED) for key, watched in drawn]
                y = self.window.y if name == "loss" else None
                labels = [legend(watched) for _, watched in drawn]
                panels.append(export.panel(TITLES[name], labels, curves, values(y, log), log))
        return {"format": kind, "title": f"smoothing {self.runs.smoothing:g}", "x": x, "panels": panels}
