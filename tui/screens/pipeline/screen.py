"""Pipeline: the DAG and the state of each stage; its params, its log, what it changed; run and stop."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from shutil import disk_usage
from typing import ClassVar

from textual import on, work
from textual.binding import Binding, BindingType
from textual.containers import Container, Vertical, VerticalScroll
from textual.events import Resize
from textual.widget import Widget
from textual.widgets import OptionList, Static

from pipeline.errors import UserError
from pipeline.project.logs.metrics_diff import Change, since_commit
from pipeline.project.params import edit
from pipeline.project.stage_graph import STAGES, Project, Stage
from pipeline.project.status import StageState, Status, project_signature
from pipeline.workbench import GRAPH, open_project
from tui.screens.base import TALL, WorkbenchScreen
from tui.screens.pipeline.dag_view import DagPicture
from tui.screens.pipeline.log_panel import LogView
from tui.screens.pipeline.metrics_panel import table
from tui.screens.pipeline.params_panel import ParamForm, written
from tui.screens.pipeline.stage_list import StageList
from tui.services.pipeline_process import Running

TICK = 0.4  # seconds between two looks at the files
EVALUATION = STAGES["evaluate"].path
PANES = {"params": "Params", "log": "Log", "metrics": "Metrics"}
ROOM = 2**20  # bytes; with fewer, a disk is full
AROUND, PANE, LEAST, LINES = 2, 8, 6, 3  # rows of the bar and the keys; of a pane, at least; of the list


class PipelineScreen(WorkbenchScreen):
    """It watches files: a pipeline that was started elsewhere looks like one that was started here."""

    NAME: ClassVar[str] = "pipeline"
    CSS_PATH = "pipeline.tcss"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("r", "run", "Run all", id="pipeline.run"),
        Binding("s", "run_stage", "Run stage", id="pipeline.run_stage"),
        Binding("S", "run_stage(True)", "Run stage again, though nothing changed", id="pipeline.force", show=False),
        Binding("x", "stop", "Stop", id="pipeline.stop"),
        *(Binding(name[0], f"pane('{name}')", label, id=f"pipeline.{name}") for name, label in PANES.items()),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.status = Status()
        self.project: Project | None = None
        self.states: dict[str, StageState] = {}
        self.stages = _stages(self.workbench.params_path)
        self.chosen = next(iter(self.stages))
        self.problem = ""  # of the params file as it is now; the project is then of the last good one
        self._seen: tuple[object, object] | None = None  # of the params file and of all else, as they were looked at
        self._compared: object = None  # and that of the metrics
        self._looking = False
        self._beside = "log"  # the pane beside the params
        self._pipeline: Running | None = None
        self._ended: Running | None = None  # a pipeline whose end is still to be said

    def body(self) -> Iterable[Widget]:
        yield Static(id="problem", markup=False)
        yield DagPicture(self.stages)
        yield StageList(self.stages, id="stages")
        with Container(id="panes"):
            with Vertical(id="params", classes="pane"):
                yield ParamForm(self.workbench.params_path.name)
            with Vertical(id="log", classes="pane"):
                yield Static(id="said", markup=False)
                yield LogView()
            with VerticalScroll(id="metrics", classes="pane"):
                yield Static(id="changes")

    def on_mount(self) -> None:
        self.query_one("#metrics").border_title = "Metrics, against the last commit"
        self.action_pane("params", focus=False)
        self.give_focus(self.query_one(StageList))
        self.set_interval(TICK, self.tick)
        self.tick()

    def on_resize(self, event: Resize) -> None:
        """The list gets what picture and panes leave of the rows, and scrolls where it has more lines."""
        picture = self.query_one(DagPicture)
        rows = picture.get_content_height() + 1
        picture.display = event.size.height >= max(TALL, AROUND + rows + LINES + LEAST)
        shown = rows if picture.display else 0
        self.query_one(StageList).styles.max_height = max(LINES, event.size.height - AROUND - shown - PANE)

    # Looking

    def tick(self) -> None:
        """Look again if files changed, or while something runs: a killed process changes none.

        That a pipeline has ended is noticed, and said, on whichever screen one is.
        """
        running = self.workbench.runner.running()
        if self._pipeline and not running:
            self._ended, self._seen = self._pipeline, None
        self._pipeline = running
        if self._looking or not (self.is_current or self._ended):
            return
        now = self._signature()
        busy = running or any(state.state == "running" for state in self.states.values())
        if now != self._seen or busy:
            self._looking = True
            self._look(now, self._ended)
            self._ended = None
        self.query_one(LogView).follow(self.workbench.runner.log)

    def _signature(self) -> tuple[object, object]:
        try:
            stat = self.workbench.params_path.stat()
            file = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        except OSError:
            file = (0, 0, 0)
        return file, self.project and project_signature(self.project)

    @work(thread=True, group="look")
    def _look(self, seen: tuple[object, object] | None, ended: Running | None) -> None:
        project, problem = self.project, self.problem
        if project is None or self._seen is None or seen is None or seen[0] != self._seen[0]:
            try:
                project, problem = open_project(self.workbench.params_path), ""
            except (UserError, OSError) as error:
                problem = str(error)
        states: dict[str, StageState] = {}
        try:
            if project and not self.states:  # the first look, which hashes all there is
                self.call_later(self._begin, project)
                states = self.status.of(project, lambda state: self.call_later(self._show_one, state))
            elif project:
                states = self.status.of(project)
        except (UserError, OSError):  # something vanished while it was read: the next look sees what is there then
            seen = None
        self.call_later(self._show, project, states or self.states, problem, seen)
        if ended:
            self.call_later(self._say_the_end, ended)

    async def _begin(self, project: Project) -> None:
        """Params are there at once."""
        if self.query(DagPicture) and self.project is None:
            self.project = project
            self._show_stages(project)
            await self._show_stage()

    def _show_stages(self, project: Project) -> None:
        """The project's stages, and its parent's."""
        self.stages = project.readable
        if self.chosen not in self.stages and self.stages:
            self.chosen = next(iter(self.stages))
        self.query_one(StageList).keep(self.stages)
        self.query_one(DagPicture).stages = self.stages

    def _show_one(self, state: StageState) -> None:
        if self.query(DagPicture) and not self.states:
            picture = self.query_one(DagPicture)
            picture.states = {**picture.states, state.stage.name: state}
            self.query_one(StageList).show({state.stage.name: state})

    async def _show(
        self,
        project: Project | None,
        states: dict[str, StageState],
        problem: str,
        seen: tuple[object, object] | None,
    ) -> None:
        if not self.query(DagPicture):  # the screen is closing
            return
        first = project is not None and self.project is None  # what else is to be watched was not known before
        self.project, self.problem, self.states, self._looking = project, problem, states, False
        self._seen = None if first else seen
        banner = self.query_one("#problem", Static)
        banner.display = bool(problem)
        banner.update(f"✗ {problem}\nShowing the last valid state." if project else f"✗ {problem}")
        if project:
            self._show_stages(project)
        self.query_one(DagPicture).states = states
        self.query_one(StageList).show(states)
        await self._show_stage()
        self._compare()

    async def _show_stage(self) -> None:
        """The panes of the chosen stage."""
        self.query_one(DagPicture).chosen = self.chosen
        if self.project and self.chosen in self.stages:
            await self.query_one(ParamForm).show(
                self.chosen, self._home(self.project).section(self.stages[self.chosen])
            )
        self.query_one("#params").border_title = f"Params of {self.chosen}"
        self.query_one("#log").border_title = f"Log of {self.chosen}, output of the pipeline"
        self.query_one("#said", Static).update(self._said())

    def _home(self, project: Project) -> Project:
        """The project that the chosen stage is of: this one or its parent."""
        return project.home(self.chosen)

    def _said(self) -> str:
        """Why the chosen stage is as it is, and what it said in its last run, whoever ran it."""
        state = self.states.get(self.chosen)
        if state is None:
            return ""
        run, reasons = state.run, list(state.reasons)
        if run and run.message and run.message not in reasons:
            reasons.append(f"its last run: {run.message}")
        lines = [*reasons, *(run.notes if run else ())]
        if state.state == "missing" and not self.workbench.runner.log.exists():
            lines.append("Nothing was run yet: press r for all stages, or type `make repro`.")
        return "\n".join(lines)

    def _compare(self) -> None:
        path = (self.project or self.workbench).root / EVALUATION / "metrics.json"
        try:
            stats = [(stat.st_mtime_ns, stat.st_size) for stat in (path.stat(), (self.workbench.root / ".git").stat())]
        except OSError:
            stats = []
        if stats != self._compared:
            self._compared = stats
            self._look_at_metrics(path)

    @work(thread=True, group="metrics", exclusive=True)
    def _look_at_metrics(self, path: Path) -> None:
        try:
            changes: list[Change] | str = since_commit(path)
        except UserError as error:
            changes = str(error)
        self.call_later(self._show_changes, changes)

    def _show_changes(self, changes: list[Change] | str) -> None:
        for widget in self.query("#changes").results(Static):  # none is there while the screen closes
            widget.update(table(changes))

    # Choosing and editing

    @on(OptionList.OptionHighlighted)
    async def _highlighted(self, event: OptionList.OptionHighlighted) -> None:
        await self._choose(str(event.option_id))

    @on(DagPicture.Chosen)
    def _clicked(self, event: DagPicture.Chosen) -> None:
        self.query_one(StageList).choose(event.stage)

    @on(OptionList.OptionSelected)
    def _entered(self) -> None:
        self.action_pane("params")

    async def _choose(self, stage: str) -> None:
        if stage == self.chosen:
            return
        lost = self.query_one(ParamForm).unsaved()
        if lost:
            self.workbench.log_message(f"Not written: {', '.join(f'{k}: {v}' for k, v in lost.items())}", "warning")
        self.chosen = stage
        await self._show_stage()

    @on(ParamForm.Saved)
    def _save(self, event: ParamForm.Saved) -> None:
        try:
            path = self._home(self.project).params_path if self.project else self.workbench.params_path
            edit.save(path, {event.key: event.value}, GRAPH.sections)
        except (UserError, OSError) as error:
            self.workbench.fail(error)
            return
        value = ", ".join(map(str, event.value)) if isinstance(event.value, list) else written(event.value)
        self.workbench.log_message(f"{event.key}: {value or 'nothing'} is in {path.name}.")
        self.tick()

    def action_leave(self) -> None:
        self.query_one(ParamForm).revert()
        self.give_focus(self.query_one(StageList))

    def action_pane(self, name: str, focus: bool = True) -> None:
        """Show a pane and give it the keys. Where there is room, params are always there and one other beside them."""
        beside = name if name != "params" else self._beside
        self._beside = beside
        for pane in self.query(".pane"):
            pane.set_class(pane.id == name, "-chosen")
            pane.set_class(pane.id == beside, "-beside")
            pane.border_subtitle = "  ".join(f"{key[0]} {label}" for key, label in PANES.items() if key != pane.id)
        if focus:
            target = {"params": "ParamForm Input", "log": "LogView", "metrics": "#metrics"}[name]
            for widget in self.query(target).results(Widget):
                self.give_focus(widget)
                return

    # Running

    def action_run(self) -> None:
        self._start("repro")

    def action_run_stage(self, force: bool = False) -> None:
        """The chosen stage alone, once all that it reads is there."""
        project, missing = self.project, list[str]()
        if project:
            try:
                needs = project.needs(project.stage(self.chosen))
            except UserError as error:
                self.workbench.fail(error)
                return
            missing = [need for need in needs if not project.artifact(need).is_dir()]
        if missing:
            self.workbench.log_message(
                f"{self.chosen} needs {', '.join(missing)} first: press r to run all.", "warning"
            )
            return
        self._start("repro", "--single-item", *(["--force"] if force else []), self.chosen)

    def _start(self, *arguments: str) -> None:
        try:
            if self.workbench.params_path.name != "params.yaml":
                raise UserError("The pipeline reads params.yaml; start lora-tui on that file to run it.")
            self._pipeline = self.workbench.runner.start(arguments)
        except (UserError, OSError) as error:
            self.workbench.fail(error)
            return
        self.workbench.log_message(f"Started: {self._pipeline.command}. It goes on if this program ends.")

    def action_stop(self) -> None:
        try:
            self.workbench.log_message(self.workbench.runner.stop(), "warning")
        except UserError as error:
            self.workbench.fail(error)

    def _say_the_end(self, ended: Running) -> None:
        """How a pipeline ended, by what its own stages say: an older failure is not its."""
        own = [state for state in self.states.values() if state.run and state.run.started >= ended.started]
        bad = [state for state in own if state.state in ("failed", "died")]
        if bad:
            self.workbench.log_message(f"{bad[0].stage.name} {bad[0].state}: {', '.join(bad[0].reasons)}", "error")
            self.query_one(StageList).choose(bad[0].stage.name)
        elif any(state.state == "stopped" for state in own):
            self.workbench.log_message("Stopped. Run it again to go on from the checkpoint.")
        elif all(state.state == "current" for state in self.states.values()):
            self.workbench.log_message("All stages are up to date.")
        elif disk_usage(self.workbench.root).free < ROOM:  # too full for the log and the journals to say so
            self.workbench.log_message(
                "The pipeline ended, and the disk is full. Free some space, then run it again.", "error"
            )
        else:
            self.workbench.log_message("The pipeline ended; its log (l) says how.", "warning")


def _stages(params: Path) -> Mapping[str, Stage]:
    """What is shown before the first look: the project's stages, or the product's where its params cannot be read."""
    try:
        return open_project(params).readable or STAGES
    except (UserError, OSError):
        return STAGES
