"""The pipeline screen: DAG, state of each stage, params, log, metrics; run and stop."""

import asyncio
from collections.abc import Iterable, Mapping
from pathlib import Path
from shutil import disk_usage
from typing import ClassVar

from rich.text import Text
from textual import on, work
from textual.binding import Binding, BindingType
from textual.containers import Container, Vertical, VerticalScroll
from textual.events import Resize
from textual.widget import Widget
from textual.widgets import OptionList, Static

from pipeline.errors import UserError
from pipeline.files.file_tail import file_stamp
from pipeline.project.params import edit
from pipeline.project.params.load import key_path
from pipeline.project.stage_graph import Project, Stage
from pipeline.project.status import StageState, Status, metrics_since_commit, project_signature
from pipeline.workbench import GRAPH, open_project
from tui.screens.base import TALL, WorkbenchScreen
from tui.screens.pipeline.dag import DagView
from tui.screens.pipeline.panels import LogView, ParamForm, StageList, metrics_table
from tui.services.pipeline_process import Running
from tui.widgets.form import Form, format_value

TICK = 0.4  # seconds between checks of the files
EVALUATION = GRAPH.stages["evaluate"].path
PANES = {"params": "Params", "log": "Log", "metrics": "Metrics"}
MIN_FREE_BYTES = 2**20  # with fewer, the disk counts as full
BAR_ROWS = 2  # of tab bar and footer
PANE_ROWS, MIN_PANE_ROWS, MIN_LIST_ROWS = 8, 6, 3


class PipelineScreen(WorkbenchScreen):
    """Shows what the files say, so that a pipeline started elsewhere looks like one started here."""

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
        try:
            self.stages: Mapping[str, Stage] = open_project(self.workbench.params_path).readable or GRAPH.stages
        except (UserError, OSError):  # shown once the first load fails too
            self.stages = GRAPH.stages
        self.chosen = next(iter(self.stages))
        self.problem = ""  # with the params file; `project` is then the last valid one
        # of the params file and of all other files, when last loaded
        self._seen_signature: tuple[object, object] | None = None
        self._metrics_signature: object = None  # of the metrics file and .git, when last compared
        self._loading = False
        self._side_pane = "log"  # the pane shown beside the params
        self._pipeline: Running | None = None
        self._ended_pipeline: Running | None = None  # a pipeline whose end is not reported yet

    def body(self) -> Iterable[Widget]:
        yield Static(id="problem", markup=False)
        yield DagView(self.stages)
        yield StageList(id="stages")
        with Container(id="panes"):
            with Vertical(id="params", classes="pane"):
                yield ParamForm(self.workbench.params_path.name)
            with Vertical(id="log", classes="pane"):
                yield Static(id="notes", markup=False)
                yield LogView()
            with VerticalScroll(id="metrics", classes="pane"):
                yield Static(id="changes")

    def on_mount(self) -> None:
        self.query_one("#metrics").border_title = "Metrics, against the last commit"
        self.action_pane("params", focus=False)
        self.query_one(StageList).show_states(self.stages, {})
        self.give_focus(self.query_one(StageList))
        self.set_interval(TICK, self.tick)
        self.tick()

    def on_resize(self, event: Resize) -> None:
        """Give the list the rows that the DAG and the panes leave; hide the DAG if there are too few."""
        dag = self.query_one(DagView)
        rows = dag.get_content_height() + 1
        dag.display = event.size.height >= max(TALL, BAR_ROWS + rows + MIN_LIST_ROWS + MIN_PANE_ROWS)
        shown = rows if dag.display else 0
        self.query_one(StageList).styles.max_height = max(
            MIN_LIST_ROWS, event.size.height - BAR_ROWS - shown - PANE_ROWS
        )

    # Watching files

    def tick(self) -> None:
        """Load again if files changed, or while something runs, since a killed process changes no file.

        The end of a pipeline is noticed and reported on every screen.
        """
        running = self.workbench.runner.running()
        if self._pipeline and not running:
            self._ended_pipeline, self._seen_signature = self._pipeline, None
        self._pipeline = running
        if self._loading or not (self.is_current or self._ended_pipeline):
            return
        now = (file_stamp(self.workbench.params_path), self.project and project_signature(self.project))
        busy = running or any(state.state == "running" for state in self.states.values())
        if now != self._seen_signature or busy:
            self._loading = True
            self._load(now, self._ended_pipeline)
            self._ended_pipeline = None
        self.query_one(LogView).follow(self.workbench.runner.log)

    @work(thread=True, group="load")
    def _load(self, seen: tuple[object, object] | None, ended: Running | None) -> None:
        project, problem = self.project, self.problem
        if project is None or self._seen_signature is None or seen is None or seen[0] != self._seen_signature[0]:
            try:
                project, problem = open_project(self.workbench.params_path), ""
            except (UserError, OSError) as error:
                problem = str(error)
        states: dict[str, StageState] = {}
        try:
            if project and not self.states:  # the first load hashes all artifacts, so show each state once known
                self.call_later(self._show_first, project)
                states = self.status.of(project, lambda state: self.call_later(self._show_first, project, state))
            elif project:
                states = self.status.of(project)
        except (UserError, OSError):  # a file vanished while it was read: try again
            seen = None
        self.call_later(self._show, project, states or self.states, problem, seen)
        if ended:
            self.call_later(self._report_end, ended)

    async def _show_first(self, project: Project, state: StageState | None = None) -> None:
        """Show the params before any state is known, then each state while the others are computed."""
        if not self.query(DagView) or self.states:
            return
        if self.project is None:
            self.project = project
            self._show_stages({})
            await self._show_stage()
        if state:
            self._show_stages({**self.query_one(DagView).states, state.stage.name: state})

    def _show_stages(self, states: Mapping[str, StageState]) -> None:
        """Show the stages of the project and of its parent, with their states."""
        if self.project:
            self.stages = self.project.readable
            if self.chosen not in self.stages and self.stages:
                self.chosen = next(iter(self.stages))
        dag = self.query_one(DagView)
        dag.stages, dag.states = self.stages, states
        self.query_one(StageList).show_states(self.stages, states)

    async def _show(
        self,
        project: Project | None,
        states: dict[str, StageState],
        problem: str,
        seen: tuple[object, object] | None,
    ) -> None:
        if not self.query(DagView):  # the screen is closing
            return
        self.project, self.problem, self.states, self._loading = project, problem, states, False
        self._seen_signature = seen
        banner = self.query_one("#problem", Static)
        banner.display = bool(problem)
        banner.update(f"✗ {problem}\nShowing the last valid state." if project else f"✗ {problem}")
        self._show_stages(states)
        await self._show_stage()
        path = (self.project or self.workbench).root / EVALUATION / "metrics.json"
        stamps = file_stamp(path), file_stamp(self.workbench.root / ".git")
        if stamps != self._metrics_signature:  # git is asked only if the metrics or its folder changed
            self._metrics_signature = stamps
            self._load_metrics(path)

    async def _show_stage(self) -> None:
        """Fill the panes for the chosen stage."""
        self.query_one(DagView).chosen = self.chosen
        if self.project and self.chosen in self.stages:
            section = self.project.home(self.chosen).section(self.stages[self.chosen])
            await self.query_one(ParamForm).show(self.chosen, section)
        self.query_one("#params").border_title = f"Params of {self.chosen}"
        self.query_one("#log").border_title = f"Log of {self.chosen}, output of the pipeline"
        # The reasons for the state of the stage, then the message and the notes of its last run
        lines: list[str] = []
        if state := self.states.get(self.chosen):
            run = state.run
            lines += state.reasons
            if run and run.message and run.message not in lines:
                lines.append(f"its last run: {run.message}")
            lines += run.notes if run else ()
            if state.state == "missing" and not self.workbench.runner.log.exists():
                lines.append("Nothing was run yet: press r for all stages, or type `make repro`.")
        self.query_one("#notes", Static).update("\n".join(lines))

    @work(group="metrics", exclusive=True)
    async def _load_metrics(self, path: Path) -> None:
        try:
            shown = metrics_table(await asyncio.to_thread(metrics_since_commit, path))
        except UserError as error:
            shown = Text(str(error), "dim")
        for widget in self.query("#changes").results(Static):  # none while the screen closes
            widget.update(shown)

    # Selecting and editing

    @on(OptionList.OptionHighlighted)
    async def _highlighted(self, event: OptionList.OptionHighlighted) -> None:
        if event.option_id == self.chosen:
            return
        if unsaved := self.query_one(ParamForm).unsaved():
            self.warn(f"Not saved: {', '.join(f'{k}: {v}' for k, v in unsaved.items())}")
        self.chosen = str(event.option_id)
        await self._show_stage()

    @on(DagView.Chosen)
    def _clicked(self, event: DagView.Chosen) -> None:
        self.query_one(StageList).choose(event.stage)

    @on(OptionList.OptionSelected)
    def _entered(self) -> None:
        self.action_pane("params")

    @on(Form.Submitted)
    def _save(self, event: Form.Submitted) -> None:
        """Write a field to the params file if its value is valid and differs from the file's."""
        params = self.query_one(ParamForm)
        if not params.form.edited(event.key) or params.form.problem(event.key):
            return
        key, value = key_path(params.stage, event.key), params.form.value(event.key)
        with self.workbench.errors_shown():
            path = self.project.home(self.chosen).params_path if self.project else self.workbench.params_path
            edit.save(path, {key: value}, GRAPH.sections)
            text = ", ".join(map(str, value)) if isinstance(value, list) else format_value(value)
            self.workbench.log_message(f"{key}: {text or '(empty)'} saved to {path.name}.")
            self.tick()

    def action_leave(self) -> None:
        self.query_one(ParamForm).revert()
        self.give_focus(self.query_one(StageList))

    def action_pane(self, name: str, focus: bool = True) -> None:
        """Show a pane and focus it. On wide terminals, the params stay visible beside another pane."""
        side_pane = name if name != "params" else self._side_pane
        self._side_pane = side_pane
        for pane in self.query(".pane"):
            pane.set_class(pane.id == name, "-chosen")
            pane.set_class(pane.id == side_pane, "-beside")
            pane.border_subtitle = "  ".join(f"{key[0]} {label}" for key, label in PANES.items() if key != pane.id)
        if focus:
            target = {"params": "ParamForm Input", "log": "LogView", "metrics": "#metrics"}[name]
            for widget in self.query(target).results(Widget):
                self.give_focus(widget)
                return

    # Running

    def action_run(self) -> None:
        self._run_dvc("repro")

    def action_run_stage(self, force: bool = False) -> None:
        """Run the chosen stage only, if all artifacts that it needs exist."""
        project = self.project
        with self.workbench.errors_shown():
            needs = project.needs(project.stage(self.chosen)) if project else []
            if missing := [need for need in needs if project and not project.artifact(need).is_dir()]:
                self.warn(f"{self.chosen} needs {', '.join(missing)} first: press r to run all.")
            else:
                self._run_dvc("repro", "--single-item", *(["--force"] if force else []), self.chosen)

    def _run_dvc(self, *arguments: str) -> None:
        with self.workbench.errors_shown():
            if self.workbench.params_path.name != "params.yaml":
                raise UserError("The pipeline reads params.yaml. Start lora-tui with --params params.yaml to run it.")
            self._pipeline = self.workbench.runner.start(arguments)
            self.workbench.log_message(f"Started: {self._pipeline.command}. It continues if you quit.")

    def action_stop(self) -> None:
        with self.workbench.errors_shown():
            self.warn(self.workbench.runner.stop())

    def _report_end(self, ended: Running) -> None:
        """Report how a pipeline ended, judged by the stages that it ran: older failures are not its own."""
        stages = [state for state in self.states.values() if state.run and state.run.started >= ended.started]
        failed = [state for state in stages if state.state in ("failed", "died")]
        if failed:
            self.workbench.log_message(
                f"{failed[0].stage.name} {failed[0].state}: {', '.join(failed[0].reasons)}", "error"
            )
            self.query_one(StageList).choose(failed[0].stage.name)
        elif any(state.state == "stopped" for state in stages):
            self.workbench.log_message("Stopped. Run again to resume from the checkpoint.")
        elif all(state.state == "current" for state in self.states.values()):
            gates = [f"{state.stage.name}: {reason}." for state in stages for reason in state.reasons]
            is_broken = any("failed" in gate for gate in gates)  # the run ended with 1 then
            self.workbench.log_message(
                " ".join(["All stages are up to date.", *gates]), "error" if is_broken else "information"
            )
        elif disk_usage(self.workbench.root).free < MIN_FREE_BYTES:  # the log may be cut off, so say it here
            self.workbench.log_message(
                "The pipeline ended, and the disk is full. Free some space, then run it again.", "error"
            )
        else:
            self.warn("The pipeline ended early. See its log (l).")
