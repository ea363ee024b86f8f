"""The pipeline screen: the stages as a tree, and of one of them its state, params and log.

Its own keys run one stage. `R` and `X`, which run and stop the pipeline, are the app's: `tui/app.py`.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from textual import on, work
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.timer import Timer
from textual.widget import Widget
from textual.widgets import Static

from pipeline.project.params.load import key_path
from pipeline.project.stage_graph import Project, Stage
from pipeline.stages.registry import GRAPH
from pipeline.views.stages import StageState
from tui.screens.base import HUGE, WIDE, WorkbenchScreen
from tui.screens.pipeline.dag import Picture
from tui.screens.pipeline.facts import FactsPane
from tui.screens.pipeline.log import ALL, StageLogs, StepLog
from tui.screens.pipeline.log_pane import LogPane
from tui.screens.pipeline.metrics_pane import MetricsPane
from tui.screens.pipeline.params import params_of
from tui.screens.pipeline.params_pane import ParamsPane
from tui.screens.pipeline.stages_pane import StagesPane
from tui.services.pipeline_process import OLD_LOG
from tui.widgets.form import format_value
from tui.widgets.pane import Pane

REST = 0.05  # seconds that the cursor rests before the panes are filled
SIDE = 72  # columns from which the tree stands beside the other panes
EVALUATION = GRAPH.stages["evaluate"].path
EMPTY = "Nothing was printed: the pipeline has not run this stage since its log began."
PANES = ("stages", "params", "log", "metrics")  # in the order of Tab


class PipelineScreen(WorkbenchScreen):
    """Shows what the files say, so that a pipeline started elsewhere looks like one started
    here.
    """

    NAME: ClassVar[str] = "pipeline"
    CSS_PATH = "pipeline.tcss"
    HELP = """\
What is made from what, which of it is out of date and why, and what runs. Choose a stage in the
tree; its state, its params and its log stand beside it. A param that is written makes its stage,
and all below, run again."""
    HORIZONTAL_BREAKPOINTS = [(0, "-stacked"), (SIDE, "-narrow"), (WIDE, "-wide"), (HUGE, "-huge")]  # noqa: RUF012
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("S", "run_stage", "Run stage", id="pipeline.run_stage"),
        Binding(
            "F",
            "run_stage(True)",
            "Run stage again, though nothing changed",
            id="pipeline.force",
            show=False,
        ),
        Binding("p", "pane('params')", "Params", id="pipeline.params"),
        Binding("L", "pane('log')", "Log", id="pipeline.log"),
        Binding(
            "d", "pane('metrics')", "Metrics since the commit", id="pipeline.metrics", show=False
        ),
        Binding("v", "picture", "Picture of the DAG", id="pipeline.picture", show=False),
        Binding("tab", "next_pane(1)", "Next pane", show=False),
        Binding("shift+tab", "next_pane(-1)", "Pane before", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        runner = self.workbench.runner
        self._logs = StageLogs(runner.runs / OLD_LOG, runner.log)
        self._steps: StepLog | None = None
        # When the watch last told: whether something ran, which stage, and which had failed
        self._was_busy, self._followed, self._failed = False, "", set[str]()
        self._pending: Timer | None = None  # to fill the panes
        self._is_moved = False  # by the user, since the run began: it is no longer followed

    def body(self) -> Iterable[Widget]:
        yield Static(id="problem", markup=False)
        with Horizontal(id="main"):
            yield StagesPane()
            with Vertical(id="right"):
                yield FactsPane()
                with Horizontal(id="panes"):
                    yield ParamsPane()
                    yield LogPane()
                    yield MetricsPane()

    def on_mount(self) -> None:
        self._show_pane("log")
        self._show_pane("params")
        self.give_focus(self.stages_pane.tree_list)

    # Its parts, and what the watch knows

    @property
    def stages_pane(self) -> StagesPane:
        return self.query_one(StagesPane)

    @property
    def params_pane(self) -> ParamsPane:
        return self.query_one(ParamsPane)

    @property
    def chosen(self) -> str:
        """The stage that the cursor is on."""
        return self.stages_pane.chosen

    @property
    def project(self) -> Project | None:
        return self.workbench.project_watch.project

    @property
    def states(self) -> Mapping[str, StageState]:
        return self.workbench.project_watch.states

    @property
    def stages(self) -> Mapping[str, Stage]:
        return self.workbench.project_watch.stages

    # Showing

    def project_changed(self) -> None:
        watch, project = self.workbench.project_watch, self.project
        if not self.query("#problem"):  # the screen is closing
            return
        banner = self.query_one("#problem", Static)
        banner.display = bool(watch.problem)
        is_last = project is not None and project.root.is_dir()
        banner.update(f"✗ {watch.problem}{' Showing the last valid state.' * is_last}")
        needs = {
            name: project.home(name).needs(stage) if project else stage.needs
            for name, stage in self.stages.items()
        }
        self.stages_pane.show(self.stages, needs, watch.states)
        self._follow()
        self._show_stage()

    def _follow(self) -> None:
        """Move the cursor to a stage that began to run, or failed, unless the user moved it or is
        typing.
        """
        watch = self.workbench.project_watch
        running = watch.running.stage.name if watch.running else ""
        failed = {name for name, state in self.states.items() if state.state in ("failed", "died")}
        is_busy = bool(running or watch.pipeline)
        if is_busy and not self._was_busy:
            self._is_moved = False
        target = running if running != self._followed else ""
        if self._was_busy and not target:
            target = next(iter(failed - self._failed), "")
        if target and not self._is_moved and not self.params_pane.edited:
            self.stages_pane.select(target)
        self._followed, self._failed, self._was_busy = running, failed, is_busy

    def _show_stage(self) -> None:
        """Fill the panes for the stage that the cursor is on."""
        if self._pending:
            self._pending.stop()
            self._pending = None
        name, project = self.chosen, self.project
        stage = self.stages.get(name)
        if stage is None:
            return
        if project:  # of an unlisted stage no file says the params
            self.params_pane.show(
                name, params_of(project, stage) if name in project.readable else []
            )
        folder = project.run_folder(name) if project else self.workbench.runner.runs / name
        if self._steps is None or self._steps.folder != folder:
            self._steps = StepLog(folder)
        self._read_logs(force=True)
        self.query_one(MetricsPane).look(
            self.workbench.root / EVALUATION / "metrics.json", self.workbench.root
        )

    def watched(self) -> Iterable[Path]:
        """The folders of the logs: the pipeline's, and each stage's."""
        project = self.project
        stages = [project.run_folder(name) for name in project.shown] if project else []
        return [self.workbench.runner.runs, *stages]

    def files_changed(self) -> None:
        if self.query(LogPane):
            self._read_logs()

    def _read_logs(self, force: bool = False) -> None:
        """Read what the logs have more, and show it."""
        steps, name = self._steps, self.chosen
        news = self._logs.read(self.stages.keys())
        news = bool(steps and steps.read()) or news
        if not (news or force) or steps is None:
            return
        state, watch = self.states.get(name), self.workbench.project_watch
        is_running = state is not None and state.state == "running"
        pane = self.query_one(LogPane)
        if pane.is_whole:
            pane.show("all stages", self._logs.lines(ALL))
        else:
            lines, width = self._logs.lines(name), pane.view.size.width
            notes = [
                f"… {note.removeprefix(f'{name}: ')}"
                for note in (state.run.notes if state and state.run else ())
            ]
            logged = [*notes, *(step.line(width) for step in steps.steps)]
            # The steps follow the command. What was printed after them, the result or an error,
            # ends the log.
            at = len(lines) if is_running else int(lines[:1] == [f"> {self.stages[name].command}"])
            pane.show(name, [*lines[:at], *logged, *lines[at:]] or [EMPTY])
        losses = [step.loss for step in steps.steps]
        pipeline = watch.pipeline if is_running else None
        self.query_one(FactsPane).show(name, state, pipeline, losses)

    # The cursor and the panes

    @on(StagesPane.Chosen)
    def _chosen(self, event: StagesPane.Chosen) -> None:
        self._is_moved = self._is_moved or (event.by_user and self._was_busy)
        # The cursor is drawn at once; the panes follow when it rests, as they take longer than a
        # key that repeats.
        self._pending = self._pending or self.set_timer(REST, self._show_stage)
        self._pending.reset()

    @on(StagesPane.Opened)
    def _opened(self) -> None:
        self.action_pane("params")

    @on(LogPane.Changed)
    def _log_changed(self) -> None:
        self._read_logs(force=True)

    def open_with(self, stage: str = "", param: str = "", **_: Any) -> None:
        """Move the cursor to a stage, and to one of its params."""
        if stage:
            self.stages_pane.select(stage)
        if param:
            self._show_stage()
            self.action_pane("params")
            self.params_pane.select(param)

    def action_pane(self, name: str) -> None:
        """Show a pane and give it the focus."""
        if self._pending:  # keys that are already typed are meant for the stage that was chosen
            self._show_stage()
        pane = self.query_one(f"#{name}", Pane)
        if self.maximized is not None and self.maximized is not pane:
            self.minimize()
        self._show_pane(name)
        target = pane.first_focusable()
        if target:
            self.give_focus(target)

    def _show_pane(self, name: str) -> None:
        """Show one of the panes at the right; where there is room, the params and another one stand
        side by side.
        """
        if name == "stages":
            return
        for pane in self.query("#panes > Pane"):
            pane.set_class(pane.id == name, "-chosen")
            if name != "params":
                pane.set_class(pane.id == name, "-beside")

    def action_next_pane(self, by: int) -> None:
        current = self.focused_pane
        at = PANES.index(current.id) if current and current.id in PANES else -1
        self.action_pane(PANES[(at + by) % len(PANES)])

    @work(group="picture")
    async def action_picture(self) -> None:
        stage = await self.app.push_screen_wait(Picture(self.stages, self.states, self.chosen))
        if stage:
            self.stages_pane.select(stage)
            self._is_moved = True

    # Editing

    @on(ParamsPane.Submitted)
    def _save(self, event: ParamsPane.Submitted) -> None:
        """Write a param; if that fails, what was typed stays in the field."""
        pane, project, param = self.params_pane, self.project, event.param
        if project is None:
            return
        key, value = key_path(pane.stage, param.key), param.field.parse(event.text)
        path = project.home(pane.stage).params_path
        with self.workbench.errors_shown():
            self.workbench.edits.save(path, {key: value})
            text = ", ".join(map(str, value)) if isinstance(value, list) else format_value(value)
            self.workbench.log_message(
                f"{key}: {text or '(empty)'} written to {path.name}. z takes it back."
            )
            pane.leave_edit()
            self.workbench.project_watch.look_now()

    @on(ParamsPane.Lost)
    def _lost(self, event: ParamsPane.Lost) -> None:
        self.warn(f"Not written: {event.text}")

    def unsaved(self) -> str:
        text = self.params_pane.unsaved()
        return f"what is typed but not written, {text}" if text else ""

    def leave_field(self) -> None:
        """Keep the value as it was."""
        if self.params_pane.field.has_focus:
            self.params_pane.leave_edit()
        else:
            super().leave_field()

    # Running

    def action_run_stage(self, force: bool = False) -> None:
        """Run the chosen stage only, if all artifacts that it needs exist."""
        project, name = self.project, self.chosen
        with self.workbench.errors_shown():
            needs = (
                project.needs(project.stage(name))
                if project and not self.workbench.project_watch.problem
                else []
            )
            if missing := [
                need for need in needs if project and not project.artifact(need).is_dir()
            ]:
                self.warn(f"{name} needs {', '.join(missing)} first: press R to run all.")
            else:
                self.workbench.start_pipeline(
                    "repro", "--single-item", *(["--force"] if force else []), name
                )
