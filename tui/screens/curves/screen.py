"""The curves screen: what every run logs over its steps, live."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import monotonic, process_time
from typing import Any, ClassVar, Literal

from rich.text import Text
from textual import on, work
from textual.binding import Binding, BindingType
from textual.containers import Container, Vertical
from textual.widget import Widget
from textual.widgets import OptionList, Static

from pipeline.files.artifact import MANIFEST
from pipeline.project.stage_graph import ARTIFACTS, RUNS
from tui.dialogs import Ask, PathScreen, Reader
from tui.registry import SCREENS
from tui.screens.base import HUGE, TALL, WIDE, WorkbenchScreen
from tui.screens.curves import export
from tui.screens.curves.describe import Paint, answers, details
from tui.screens.curves.metrics import METRICS
from tui.screens.curves.panes import (
    AnswersPane,
    ChartPane,
    DetailsPane,
    MetricsPane,
    Panel,
    RunList,
    RunsPane,
    SmallPlots,
)
from tui.screens.curves.runs import RunView
from tui.screens.curves.selection import Drawn, Runs
from tui.screens.curves.window import Window
from tui.widgets.plot.chart import Chart
from tui.widgets.plot.line_plot import Line, View
from tui.widgets.plot.scale import Range, spans_decade

EMPTY = "No runs yet. R runs the pipeline; each training stage then has its curve here."
SMOOTHING = 0.9  # initial
SMOOTHINGS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
CPU_SHARE = 0.02  # of a core for drawing a live chart, since training needs the rest
MAX_DELAY = 2.0  # seconds after which it is drawn anyway
# columns and rows from which there is room for the list beside the chart, for small plots
TWO_COLUMNS, HIGH = 76, 32


class CurvesScreen(WorkbenchScreen):
    """Connects files, plots and the list of runs."""

    NAME: ClassVar[str] = "curves"
    HELP = """\
What the training runs log over their steps: loss, held-out loss, divergence, pace, memory, and the
answers that they gave. Running ones are followed. `x` saves what is shown as a picture or as
numbers."""
    CSS_PATH = "curves.tcss"
    AUTO_FOCUS = "RunList"
    HORIZONTAL_BREAKPOINTS = [  # noqa: RUF012  # as Textual declares it
        (0, "-tiny"),
        (TWO_COLUMNS, "-narrow"),
        (WIDE, "-wide"),
        (HUGE, "-huge"),
    ]
    VERTICAL_BREAKPOINTS = [(0, "-short"), (TALL, "-low"), (HIGH, "-high")]  # noqa: RUF012
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "sideways(-1)", "Step cursor", id="curves.left", key_display="← →"),
        Binding("right", "sideways(1)", "Step cursor to the right", id="curves.right", show=False),
        Binding("l", "log", "Log", id="curves.log"),
        Binding(
            "comma",
            "smooth(-1)",
            "Smooth less",
            id="curves.smooth_less",
            key_display=",",
            show=False,
        ),
        Binding("full_stop", "smooth(1)", "Smooth", id="curves.smooth_more", key_display=", ."),
        Binding("x", "export", "Export", id="curves.export"),
        Binding("a", "answers", "Answers", id="curves.answers"),
        Binding("0", "reset", "All steps", id="curves.reset"),
        Binding("f", "follow", "Follow", id="curves.follow"),
        Binding("minus", "zoom(1.43)", "Zoom out", id="curves.out", show=False),
        Binding("equals_sign", "zoom(0.7)", "Zoom in", id="curves.in", show=False),
        Binding("shift+left", "pan(-0.1)", "Earlier steps", id="curves.earlier", show=False),
        Binding("shift+right", "pan(0.1)", "Later steps", id="curves.later", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.window = Window()
        self.metric = "loss"  # that of the large chart
        self.runs = Runs(self.workbench.root, self.workbench.params_path, SMOOTHING)
        self.logarithmic = False  # whether the large chart is drawn so
        self._opened: set[str] = set()  # sweeps whose adapters are listed
        self._wanted = ""  # a run that another screen asked for, until it is found
        self._answers: bool | None = None  # whether they are shown, if the user has said so
        self._states: dict[str, str] = {}  # of the stages, when it was last read what they kept
        self._reading = False
        self._is_stale = False  # a file may have changed since the last reading began
        self._drawn_at = self._cpu_time = 0.0  # wall-clock and CPU seconds at the last redraw

    def body(self) -> Iterable[Widget]:
        with Container(id="panes"):
            with Vertical(id="plots"):
                yield ChartPane()
                yield MetricsPane()
            with Vertical(id="side"):
                yield RunsPane()
                yield DetailsPane()
                yield AnswersPane()
        yield Static(EMPTY, id="nothing", markup=False)

    def open_with(self, run: str = "", **_: Any) -> None:
        """Show a run: its stage (the newest of it), its method, or `finetune_sweep/NAME` for an
        adapter of a sweep.
        """
        self._wanted = run
        self._find_wanted()

    def _find_wanted(self) -> None:
        """Point to the run that another screen asked for, once it is found."""
        wanted, _, adapter = self._wanted.partition("/")
        names = {wanted, f"finetune_{wanted}"}
        key = next((key for key, view in self.runs.views.items() if view.run.stage in names), "")
        if not wanted or not key:
            return
        self._wanted = ""
        self.runs.show(key)
        if curve_log := self.runs.views[key].curve_logs.get(adapter):
            self._opened.add(key)
            key = self.runs.views[key].adapter_key(curve_log) or key
        self._update_list()
        self._point_to(key)
        self._read_now()

    def project_changed(self) -> None:
        """Progress is a change too; what was kept changes when a stage does."""
        states: dict[str, str] = {
            name: state.state for name, state in self.workbench.project_watch.states.items()
        }
        if states != self._states:
            self._states = states
            self._read_kept()
            self._look()

    @work(exclusive=True, group="kept")
    async def _read_kept(self) -> None:
        """A stage has ended, perhaps an evaluation."""
        await self.runs.read_kept(self.workbench.project_watch.project)
        self._update_list()

    # Reading files

    def watched(self) -> Iterable[Path]:
        """The params, which name the runs, and the folders of their logs, the parent's too."""
        project = self.workbench.project_watch.project
        roots = [self.workbench.root]
        if project and project.parent:
            roots.append(project.parent.root)
        logs = [root / name for root in roots for name in (RUNS, ARTIFACTS)]
        return [self.workbench.params_path, *logs]

    def files_changed(self) -> None:
        self._is_stale = True
        self._look()

    def tick(self) -> None:
        """A run whose process was killed changes no file."""
        if self._is_stale or any(view.alive for view in self.runs.views.values()):
            self._look()

    def _look(self) -> None:
        """Check everything that may have changed: os.stat, and the small run states."""
        if self.is_current and not self._reading:
            self._read()

    @work
    async def _read(self) -> None:
        self._reading, self._is_stale = True, False
        try:
            first = self.runs.stamp is None
            rediscovered = await self.runs.rediscover()
            state_changes = [view.poll_state() for view in self.runs.views.values()]
            if rediscovered or any(state_changes):
                started = self.runs.update_shown()
                if first and started:
                    self._update_list()
                    self._point_to(next(key for key in self.runs.views if key in started))
            # Read and draw only while that stays within CPU_SHARE, or if the last time is MAX_DELAY
            # ago.
            since = monotonic() - self._drawn_at
            due = (
                rediscovered
                or since > MAX_DELAY
                or process_time() - self._cpu_time < CPU_SHARE * since
            )
            self._is_stale = self._is_stale or not due
            changed = [view for _, view in self.runs.visible() if due and view.changed()]
            for view in changed:
                await view.read()
            if rediscovered or changed:
                self.redraw()
            elif any(state_changes):
                self._update_list()
                self._show_texts(self.drawn())
            self._find_wanted()
        finally:
            self._reading = False

    # Drawing

    @property
    def chart(self) -> Chart:
        return self.query_one(Chart)

    def redraw(self) -> None:
        """Draw everything. Does nothing before the first search for runs."""
        if self.runs.stamp is None:
            return
        self._drawn_at, self._cpu_time = monotonic(), process_time()
        first_run = self.has_class("-empty") and bool(self.runs.views)
        self.set_class(not self.runs.views, "-empty")
        if first_run and self.focused is None:  # the list lost the focus when it was hidden
            self.give_focus(self.query_one(RunList))
        self._update_list()
        self._draw_plots()

    def _draw_plots(self) -> None:
        drawn, x = self.drawn(), self.steps()
        background = self.chart.background_colors[1]
        logged = self.runs.logged()
        if self.metric not in logged:
            self.metric = "loss"

        def lines(name: str, columns: int, labels: bool = False) -> list[Line]:
            return [
                line.line(name, x, columns, self.window.cursor, background, labels)
                for line in drawn
            ]

        large = lines(self.metric, self.chart.columns, labels=True)
        usual = spans_decade(value for line in large if not line.stray for value in line.values())
        self.logarithmic = usual if self.window.log is None else self.window.log
        self.chart.draw(large, View(x, self.window.y, self.logarithmic, self.window.cursor))
        self._show_title(large)
        small = [name for name in logged if name != self.metric]
        constant = [name for name in small if self.runs.is_constant(name)]
        panels = [
            Panel(name, *self._value(drawn, name), partial(lines, name))
            for name in small
            if name not in constant
        ]
        numbers = [(METRICS[name].short, self._value(drawn, name)[0]) for name in constant]
        self.query_one(SmallPlots).draw(panels, numbers, View(x, cursor=self.window.cursor))
        self._show_texts(drawn)

    def _value(self, drawn: list[Drawn], name: str) -> tuple[str, str]:
        """The value of the pointed run, else of the uppermost that has one, and the colour of that
        run.
        """
        for line in reversed(drawn):
            value = None if line.quiet else line.value(name, self.window.cursor)
            if value is not None:
                return METRICS[name].format(value), self._paint(self.chart).of(line.look)
        return "–", ""

    def _show_title(self, lines: list[Line]) -> None:
        """What is drawn, as much of it as there is room for: the least important comes last."""
        facts = self.window.facts(self.steps())
        facts.append("log" if self.logarithmic else "linear")
        if self.logarithmic and any(y <= 0 for line in lines for y in line.values()):
            facts.append("without values ≤ 0")
        facts += ["× held out"] * any(line.marks for line in lines) + [
            f"smooth {self.runs.smoothing:g}"
        ]
        title, pane = METRICS[self.metric].title, self.query_one(ChartPane)
        while len(facts) > 1 and len(title) + len(" · ".join(facts)) + 4 > pane.size.width:
            facts.pop()
        pane.show_title(" · ".join(facts), title=title)

    def _show_texts(self, drawn: list[Drawn]) -> None:
        has_answers = self.runs.has_answers()
        wanted = self.has_class("-high") if self._answers is None else self._answers
        self.set_class(has_answers and wanted, "-answers")
        pane = self.query_one(AnswersPane)
        paint = self._paint(pane)
        if has_answers:
            pane.show_text(answers(drawn, self.window.cursor, paint))
        line = self._pointed_line()
        self.query_one(DetailsPane).show_text(
            details(line, self.window.cursor, paint) if line else Text()
        )

    def _paint(self, widget: Widget) -> Paint:
        return Paint(widget.background_colors[1], self.app.theme_variables, widget.size.width)

    def _update_list(self) -> None:
        pane = self.query_one(RunsPane)
        self.query_one(RunList).show_runs(self.runs, self._opened, pane.filter_text)
        facts = f"{len(self.runs.shown)} of {len(self.runs.views)} on"
        pane.show_title(facts + (" · loss, kept" if self.app.size.width >= WIDE else ""))

    def drawn(self) -> list[Drawn]:
        """The curves that are on, in drawing order."""
        return self.runs.drawn(self.query_one(RunList).pointed)

    def _pointed_view(self) -> tuple[str, RunView] | None:
        """Key and view of the run that the cursor is on, or whose adapter it is on."""
        runs = self.query_one(RunList)
        key = runs.sweeps.get(runs.pointed, runs.pointed)
        return (key, self.runs.views[key]) if key in self.runs.views else None

    def _pointed_line(self) -> Drawn | None:
        found, pointed = self._pointed_view(), self.query_one(RunList).pointed
        if found is None:
            return None
        key, view = found
        curves = (
            log for log in view.curve_logs.values() if pointed and view.adapter_key(log) == pointed
        )
        return Drawn(view, next(curves, view.best), self.runs.looks[key])

    def steps(self) -> Range:
        """The visible steps."""
        return self.window.steps(self.runs)

    # Runs

    def _point_to(self, key: str) -> None:
        runs = self.query_one(RunList)
        index = next((i for i, option in enumerate(runs.options) if option.id == key), None)
        if index is not None:
            runs.highlighted = index
        self.redraw()

    @on(OptionList.OptionSelected)
    def _clicked_run(self) -> None:
        self.action_open()

    @on(OptionList.OptionHighlighted)
    def _pointed(self) -> None:
        if self.runs.stamp is not None:
            self._draw_plots()

    @on(RunsPane.Filtered)
    def _filtered(self) -> None:
        self.redraw()

    def action_switch(self) -> None:
        """Switch the run, or the sweep of an adapter, on or off."""
        if found := self._pointed_view():
            self.runs.toggle(found[0])
            self._read_now()

    def _read_now(self) -> None:
        """Draw, and read a run that is on now at once."""
        self.redraw()
        self._drawn_at = 0.0
        self._look()

    def action_open(self) -> None:
        """List a sweep's adapters, or no longer; show or hide any other run."""
        found = self._pointed_view()
        if found and found[1].run.sweeps:
            self._opened ^= {found[0]}
            if found[0] in self._opened:
                # hidden runs are not read, so its adapters would have no numbers
                self.runs.show(found[0])
            self._read_now()
        else:
            self.action_switch()

    def action_info(self) -> None:
        """All that is known of the run, with its settings."""
        if line := self._pointed_line():
            text = details(line, self.window.cursor, self._paint(self))
            settings = [f"{key}  {value}" for key, value in line.view.run.params.items()]
            text.append("\n\nSettings\n" if settings else "", "bold").append("\n".join(settings))
            self.app.push_screen(Reader(text, title="Run"))

    def action_stage(self) -> None:
        """The stage that the run is of."""
        if found := self._pointed_view():
            self.workbench.go("pipeline", stage=found[1].run.stage)

    def action_chat(self) -> None:
        """Talk with the model that the run made."""
        line, project = self._pointed_line(), self.workbench.project_watch.project
        if not line or not project or "chat" not in SCREENS:
            return
        run = line.view.run
        folders = (
            at / line.curve_log.name
            for at in (run.log_folder, project.artifact(run.stage))
            if run.digest
        )
        if model := next((folder for folder in folders if (folder / MANIFEST).is_file()), None):
            self.workbench.go("chat", models=[model])
        else:
            self.warn("This run has made no model yet.")

    # The window

    def _set_window(self, **change: object) -> None:
        self._show(replace(self.window, **change))  # type: ignore[arg-type]

    def _show(self, window: Window) -> None:
        self.window = window
        self._draw_plots()
        self.refresh_bindings()

    @on(Chart.Moved)
    def _moved(self, event: Chart.Moved) -> None:
        """Stay at the new ranges."""
        y = event.y if event.y != self.chart.plot.y else self.window.y
        self._set_window(x=event.x, y=y, following=False)

    @on(Chart.Clicked)
    def _clicked(self, event: Chart.Clicked) -> None:
        self._set_window(cursor=round(event.x))

    @on(Chart.Resized)
    @on(SmallPlots.Resized)
    def _resized(self) -> None:
        if self.runs.stamp is not None:
            self._draw_plots()

    @on(SmallPlots.Chosen)
    def _chosen(self, event: SmallPlots.Chosen) -> None:
        self.metric = event.name
        self._set_window(y=None, log=None)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action == "leave" and (self.window.cursor is not None or self.metric != "loss"):
            return True
        if action == "answers":
            return self.runs.has_answers()
        if action == "follow":
            return self.window.x is not None and not self.window.following
        if action == "reset":
            return self.window.x is not None or self.window.y is not None
        return super().check_action(action, parameters)

    def action_leave(self) -> None:
        """As everywhere; then end the step cursor, then bring the loss back."""
        if super().check_action("leave", ()):
            super().action_leave()
        elif self.window.cursor is not None:
            self._set_window(cursor=None)
        else:
            self.metric = "loss"
            self._set_window(y=None, log=None)

    def action_log(self) -> None:
        self._set_window(log=not self.logarithmic, y=None)

    def action_follow(self) -> None:
        self._set_window(following=True, y=None)

    def action_reset(self) -> None:
        self._set_window(x=None, y=None, following=False)

    def action_sideways(self, direction: int) -> None:
        """Move the step cursor; the first press sets it to the last step of the run that the list's
        cursor is on.
        """
        line = self._pointed_line()
        last = (
            line.curve_log.log.steps[-1] if line and line.curve_log.log.steps else self.steps()[1]
        )
        self._show(self.window.sideways(direction, self.steps(), self.chart.plot.width, last))

    def action_end_of_steps(self, end: Literal[0, 1]) -> None:
        self._set_window(cursor=round(self.steps()[end]))

    def action_pan(self, x: float, y: float = 0.0) -> None:
        self.chart.pan(x, y)

    def action_zoom(self, x: float, y: float = 1.0) -> None:
        self.chart.zoom(x, y, self.window.cursor)

    def action_answers(self) -> None:
        """Show or hide what the runs answered."""
        self._answers = not self.has_class("-answers")
        self._draw_plots()

    def action_smooth(self, direction: Literal[-1, 1]) -> None:
        index = min(max(SMOOTHINGS.index(self.runs.smoothing) + direction, 0), len(SMOOTHINGS) - 1)
        if self.runs.smoothing != SMOOTHINGS[index]:
            # now: the next key may come before the lines are smoothed
            self.runs.smoothing = SMOOTHINGS[index]
            self._smooth()

    @work(exclusive=True, group="smooth")
    async def _smooth(self) -> None:
        await self.runs.smooth()
        self._draw_plots()

    # Export

    @work
    async def action_export(self) -> None:
        views = [view for _, view in self.runs.visible()]
        if not any(log.steps for view in views for log in view.logs):
            hint = "switch a run on in the list" if self.runs.views else "there are no runs yet"
            self.warn(f"There is nothing to export: {hint}.")
            return
        stem = f"curves-{views[0].run.stage}" if len(views) == 1 else "curves"
        question = (
            "Save what is shown as a picture (.svg, .png), or the numbers of the runs that are on "
            "(.csv)"
        )
        name = export.free_name(self.workbench.root, stem)
        answer = await self.app.push_screen_wait(PathScreen(question, name))
        if answer is None:
            return
        with self.workbench.errors_shown():
            path = export.path_for(self.workbench.root, answer)
            if path.exists():
                ask = Ask(f"{answer} exists.", {"y": "replace it"}, title="Export")
                if not await self.app.push_screen_wait(ask):
                    return
            await export.save(path, views, self.panels(), self.steps(), self.runs.smoothing)
            self.workbench.log_message(f"Exported to {path}.")

    def panels(self) -> list[dict[str, Any]]:
        """The plots that are visible, at a higher resolution, as `pipeline.stages.charts` takes
        them.
        """
        drawn, x = self.drawn(), self.steps()
        large = export.panel(self.metric, drawn, x, self.chart.plot.y, self.logarithmic)
        small = [
            name
            for name in self.runs.logged()
            if name != self.metric and not self.runs.is_constant(name)
        ]
        return [large, *(export.panel(name, drawn, x) for name in small)]
