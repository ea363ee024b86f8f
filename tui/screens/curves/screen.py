"""The curves screen: every run's loss over its steps, live, beside the runs before it."""

import asyncio
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from time import monotonic, process_time
from typing import ClassVar, Literal

from textual import on, work
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.widget import Widget
from textual.widgets import Static

from pipeline.errors import UserError
from tui.screens.base import WorkbenchScreen
from tui.screens.curves import export
from tui.screens.curves.run_list import RunList
from tui.screens.curves.runs import Runs
from tui.screens.curves.series import QUANTITIES
from tui.screens.curves.view_model import TITLES, Line, Window, has, lines, mode, rows, values
from tui.widgets.plot.curve import Range, View, range_of
from tui.widgets.plot.line_chart import LossChart

EMPTY = "No runs yet: press 1 then r, or type `make repro`."
SMOOTHING = 0.9  # at first
SMOOTHINGS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
POLL = 0.5  # seconds between two looks at the files
SHARE, LATEST = 0.03, 2.0  # of a core for a live picture; where that is little, seconds until it is drawn anyway
PRINTED = 600  # columns of an exported picture


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
        self._opened: set[str] = set()  # sweeps whose adapters are listed
        self._pointed = ""  # the one of these that the highlight is on
        self._reading = False
        self._diverging = False  # whether the footer offers the panel of divergence
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
        """Every chart, the line below and the list, from what was read; nothing before the first look."""
        if self.runs.stamp is None:
            return
        self._drawn_at, self._spent = monotonic(), process_time()
        appeared = self.has_class("-empty") and bool(self.runs.watched)
        self.set_class(not self.runs.watched, "-empty")
        if appeared and self.focused is None:  # the chart lost the focus when it was hidden
            self.give_focus(self._chart)
        self.set_class(any(map(self._panel_shown, QUANTITIES[1:])), "-panel")
        shown, x = self._lines(), self._x()
        for chart in self.query(LossChart):
            name = str(chart.id)
            chart.display = name == "loss" or self._panel_shown(name)
            if chart.display:
                loss = name == "loss"
                view = View(x, self.window.y if loss else None, loss and self.window.log, self.window.cursor)
                chart.draw([line.curve(name, x, chart.columns) for line in shown], view)
        self.query_one("#mode", Static).update(mode(self.window, self.runs.smoothing, shown))
        self._list()
        if self._diverging != has(self.runs.drawn(), "divergence"):  # each refresh builds the footer anew: not per key
            self._diverging = not self._diverging
            self.refresh_bindings()

    def _lines(self) -> list[Line]:
        return lines(self.runs.drawn(), self.runs.looks, self._pointed)

    def _x(self) -> Range:
        return self.window.steps(self.runs.drawn())

    def _panel_shown(self, name: str) -> bool:
        return self._panels.get(name, self.has_class("-tall")) and has(self.runs.drawn(), name)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action == "panel":
            return has(self.runs.drawn(), str(parameters[0]))
        return super().check_action(action, parameters)

    def _list(self) -> None:
        runs = self.runs
        self.query_one(RunList).show(list(rows(runs.watched, runs.looks, runs.shown, self._opened)))

    # What the user does

    @on(RunList.Toggled)
    def _toggle(self, event: RunList.Toggled) -> None:
        self.runs.toggle(event.key)
        self.redraw()
        self._drawn_at = 0.0  # what is switched on is read and drawn at once
        self._poll()

    @on(RunList.Opened)
    def _open(self, event: RunList.Opened) -> None:
        """A sweep whose adapters are listed is shown too: of others nothing is read."""
        self._opened ^= {event.key}
        if event.key in self._opened and event.key not in self.runs.shown:
            self._toggle(RunList.Toggled(event.key))
        else:
            self.redraw()

    @on(RunList.Pointed)
    def _point(self, event: RunList.Pointed) -> None:
        row = self.query_one(RunList).pointed
        pointed = event.key if row is not None and row.of else ""
        if pointed != self._pointed:
            self._pointed = pointed
            self.redraw()

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
        from tui.screens.curves.export_dialog import ExportScreen

        drawn = self.runs.drawn()
        if not any(log.steps for _, watched in drawn for log in watched.logs):
            hint = "switch a run on in the list below" if self.runs.watched else "there are no runs yet"
            self.workbench.log_message(f"There is nothing to export: {hint}.", "warning")
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
                drawn = [watched for _, watched in self.runs.drawn()]
                logs = [(one.run.curve_label(name), trace.log) for one in drawn for name, trace in one.traces.items()]
                pieces = export.csv_lines(logs)
            else:
                pieces = iter([await export.drawn(self._picture(path.suffix[1:].lower()))])
            await asyncio.to_thread(export.save, path, pieces)
        except (UserError, OSError) as error:
            self.workbench.fail(error)
        else:
            self.workbench.log_message(f"Written: {path}")

    def _picture(self, kind: str) -> dict[str, object]:
        """What is on the screen, in more columns."""
        shown, x, panels = lines(self.runs.drawn(), self.runs.looks), self._x(), []
        for chart in self.query(LossChart):
            if chart.display:
                name, log = str(chart.id), chart.id == "loss" and self.window.log
                curves = [line.curve(name, x, PRINTED) for line in shown]
                y = self.window.y if name == "loss" else None
                if y is None and not log and any(curve.stray for curve in curves):
                    y = range_of(curves)
                panels.append(export.panel(TITLES[name], [line.label for line in shown], curves, values(y, log), log))
        return {"format": kind, "title": f"smoothing {self.runs.smoothing:g}", "x": x, "panels": panels}
