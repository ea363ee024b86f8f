"""The pipeline screen: the stages as a tree, and of one of them its state, params and log.

Its own keys run one stage. `R` and `X`, which run and stop the pipeline, are the app's: `tui/app.py`.
"""

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from textual import on, work
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.widget import Widget
from textual.widgets import Static

from pipeline.fleet.run import look_at_runs
from pipeline.fleet.states import Fleet
from pipeline.project.stage_graph import Project, Stage
from pipeline.stages.registry import GRAPH
from pipeline.views.stage_logs import ALL, StageLogs
from pipeline.views.stage_tree import stage_rows
from pipeline.views.stages import StageState
from tui.panes.fields import Field
from tui.panes.form import Form
from tui.panes.pane import Pane
from tui.panes.table import Table
from tui.panes.text import Text, say
from tui.screens.base import HUGE, WIDE, WorkbenchScreen
from tui.screens.pipeline import fleet, stages
from tui.screens.pipeline.about import PANES
from tui.screens.pipeline.fleet import UnitTable
from tui.screens.pipeline.log import LogPane
from tui.screens.pipeline.metrics import Metrics
from tui.screens.pipeline.params import in_order_of, params_of
from tui.screens.pipeline.tree import StageTree
from tui.services.pipeline_process import OLD_LOG

REST = 0.05  # seconds that the cursor rests before the panes are filled
SIDE = 72  # columns from which the tree stands beside the other panes
METRICS = f"{GRAPH.stages['evaluate'].path}/metrics.json"
TAB_ORDER = ("stages", "units", "params", "log", "metrics")


class PipelineScreen(WorkbenchScreen):
    """Shows what the files say, so that a pipeline started elsewhere looks like one started
    here.
    """

    NAME: ClassVar[str] = "pipeline"
    CSS_PATH = "pipeline.tcss"
    AUTO_FOCUS = "#stages Table"
    PANES = PANES
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
        Binding("tab", "next_pane(1)", "Next pane", show=False),
        Binding("shift+tab", "next_pane(-1)", "Pane before", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        runner = self.workbench.runner
        self.logs = StageLogs(runner.runs / OLD_LOG, runner.log)
        self.is_whole = False  # whether the log is that of all stages
        self.fleets, self._is_stale = list[Fleet](), True  # whether others may be there now
        # what the params are read for: the stage, the project, and the state without its run
        self._filled: tuple[str, Project | None, StageState | None] = "", None, None
        # They are attributes, as messages can arrive while the screen closes.
        self.problem, self.rows, self.facts = Static(markup=False), StageTree(), Text()
        self.units = UnitTable()
        self.params, self.log_pane, self.metrics = Form(), LogPane(), Metrics()

    def body(self) -> Iterable[Widget]:
        self.problem.id = "problem"
        yield self.problem
        with Horizontal(id="main"):
            yield self.pane("stages", self.rows)
            with Vertical(id="right"):
                yield self.pane("facts", self.facts)
                yield self.pane("units", self.units)
                with Horizontal(id="panes"):
                    yield self.pane("params", self.params)
                    yield self.log_pane
                    yield self.pane("metrics", self.metrics)

    def on_mount(self) -> None:
        self._show_pane("log")
        self._show_pane("params")

    # What the watch knows

    @property
    def chosen(self) -> str:
        """The stage that the cursor is on."""
        return self.rows.stage

    @property
    def project(self) -> Project | None:
        return self.workbench.project_watch.project

    @property
    def states(self) -> Mapping[str, StageState]:
        return self.workbench.project_watch.states

    @property
    def stages(self) -> Mapping[str, Stage]:
        return self.workbench.project_watch.stages

    @property
    def needs(self) -> dict[str, list[str]]:
        """Stage → the stages that it reads."""
        project, needs = self.project, {}
        for name, stage in self.stages.items():
            needs[name] = project.home(name).needs(stage) if project else list(stage.needs)
        return needs

    def _run_folder(self, stage: str) -> Path:
        return (
            self.project.run_folder(stage) if self.project else self.workbench.runner.runs / stage
        )

    def watched(self) -> Iterable[Path]:
        """The logs, which are the parent's too, and what the metrics are compared from."""
        root = self.workbench.root
        runs = {self._run_folder(stage).parent for stage in self.stages}
        return {*runs, self.workbench.runner.runs, root / METRICS, root / ".git" / "index"}

    def files_changed(self) -> None:
        self._is_stale = True
        self.call_later(self._fill)
        self.metrics.look(self.workbench.root / METRICS, self.workbench.root)

    def tick(self) -> None:
        """Look at the fleets; a unit whose process was killed changes no file."""
        if self._is_stale or any(run.state == "running" for run in self.fleets):
            self._look_at_fleets()

    @work(exclusive=True, group="fleets")
    async def _look_at_fleets(self) -> None:
        """Read what units do; no engine is asked, as that may take seconds."""
        self._is_stale = False
        runs = await asyncio.to_thread(look_at_runs, self.workbench.root)
        shown = [run for run in runs if fleet.is_shown(run, self.states.get(run.stage))]
        if shown != self.fleets:
            self.fleets = shown
            self._show_rows()

    def project_changed(self) -> None:
        watch, project = self.workbench.project_watch, self.project
        is_last = project is not None and project.root.is_dir()
        self.problem.display = bool(watch.problem)
        say(self.problem, f"✗ {watch.problem}{' Showing the last valid state.' * is_last}")
        self._show_rows()
        self.query_one("#stages", Pane).show_title(stages.counts(watch.states.values()))
        self.rows.follow(watch, move=not self.params.is_typing)
        self.follow_files()

    def _show_rows(self) -> None:
        self.rows.show(stage_rows(self.stages, self.needs, self.states, self.fleets))

    # Filling the panes

    @on(Table.Pointed, "#stages Table")
    @work(exclusive=True, group="rest")
    async def _fill_soon(self) -> None:
        """Fill the panes once the cursor rests: they take longer than a key that repeats."""
        await asyncio.sleep(REST)
        self.call_later(self._fill)

    async def _fill(self) -> None:
        """Show what there is of the stage that the cursor is on."""
        name, run = self.chosen, self.rows.fleet
        self.set_class(run is not None, "-fleet")
        if run is not None:
            self._show_fleet(run)
        if name not in self.stages:
            return
        await self._show_params(name)
        wanted, folder = ALL if self.is_whole else name, self._run_folder(name)
        log = await asyncio.to_thread(self.logs.read, wanted, folder, self.stages)
        if name != self.chosen:
            return
        state, pipeline = self.states.get(name), self.workbench.project_watch.pipeline
        self.log_pane.show(log, state)
        if self.rows.fleet:
            return
        losses = [step.loss for step in log.steps]
        rows = list(stages.facts(state, pipeline, losses)) if state else []
        self.facts.show(partial(stages.draw_facts, rows))
        self.query_one("#facts", Pane).show_title(stages.headline(state), title=name)

    def _show_fleet(self, run: Fleet) -> None:
        self.facts.show(partial(stages.draw_facts, list(fleet.facts(run))), again=True)
        self.query_one("#facts", Pane).show_title(fleet.headline(run), title="Fleet")
        self.units.show(run.units)
        self.query_one("#units", Pane).show_title(run.name)

    async def _show_params(self, name: str) -> None:
        """Read and show the params, unless they are shown: of a run that goes on, others are new."""
        project, state = self.project, self.states.get(name)
        before = self._filled
        self._filled = name, project, replace(state, run=None) if state else None
        if self._filled == before:
            return
        fields, values = list[Field](), dict[str, Any]()
        if project and name in project.readable:  # of an unlisted stage no file says the params
            fields, values = await asyncio.to_thread(params_of, project, self.stages[name])
        again = name == before[0]
        if again:
            fields = in_order_of(fields, self.params.fields)
        self.params.show(fields, values, again=again)
        changed = sum(bool(field.sign) for field in fields)
        self.query_one("#params", Pane).show_title(*[f"{changed} changed"] * bool(changed))

    # Params

    @on(Form.Submitted, "#params Form")
    def _write(self, event: Form.Submitted) -> None:
        """Write a param; if that fails, what was typed stays in the field."""
        project, field = self.project, self.params.fields[event.key]
        if project is None:
            return
        path = project.home(self._filled[0]).params_path
        with self.workbench.errors_shown():
            self.workbench.write_params(path, {field.path: field.parse(event.text)})
            self.params.close()

    @on(Form.Lost, "#params Form")
    def _lost(self, event: Form.Lost) -> None:
        self.warn(f"Not written: {event.unsaved}")

    def action_edit_param(self) -> None:
        self.params.action_open()

    def unsaved(self) -> str:
        text = self.params.unsaved()
        return f"what is typed but not written, {text}" if text else ""

    # The cursor and the panes

    @on(Table.Opened, "#stages Table")
    async def _stage_opened(self, event: Table.Opened) -> None:
        if event.row.members:
            self.rows.fold_group()
        else:
            await self.action_pane("units" if event.row.fleet else "params")

    @on(Table.Chosen, "#stages Table")
    def _stage_chosen(self) -> None:
        self.rows.fold_group()

    def open_with(self, stage: str = "", param: str = "", **_: Any) -> None:
        """Move the cursor to a stage, and to one of its params."""
        if stage:
            self.rows.place(stage)
        if param:
            self.call_later(self._open_param, param)

    async def _open_param(self, key: str) -> None:
        await self.action_pane("params")
        self.query_one("#params", Pane).close_filter()
        self.params.filter("")  # now: the field's message is still on the way
        self.params.point(key)

    async def action_pane(self, name: str) -> None:
        """Show a pane and give it the focus."""
        # keys already typed are meant for the stage that was chosen
        if self._filled[0] != self.chosen:
            await self._fill()
        pane = self.query_one(f"#{name}", Pane)
        if self.maximized is not None and self.maximized is not pane:
            self.minimize()
        self._show_pane(name)
        if target := pane.first_focus():
            self.give_focus(target)

    def _show_pane(self, name: str) -> None:
        """Show one of the panes at the right; where there is room, the params and another one stand
        side by side.
        """
        if name in ("stages", "units"):
            return
        for pane in self.query("#panes > Pane"):
            pane.set_class(pane.id == name, "-chosen")
            if name != "params":
                pane.set_class(pane.id == name, "-beside")

    async def action_whole_log(self) -> None:
        self.is_whole = not self.is_whole
        await self._fill()

    async def action_next_pane(self, by: int) -> None:
        current = self.focused_pane
        names = [name for name in TAB_ORDER if name != "units" or self.has_class("-fleet")]
        at = names.index(current.id) if current and current.id in names else -1
        await self.action_pane(names[(at + by) % len(names)])

    # Running

    def action_run_stage(self, force: bool = False) -> None:
        """Run the chosen stage only, if all artifacts that it needs exist."""
        project, name, needs = self.project, self.chosen, list[str]()
        if run := self.rows.fleet:  # a second process would train the same
            self.warn(
                f"`lora fleet collect {run.name}` waits for its units and takes their results."
            )
            return
        with self.workbench.errors_shown():
            if project and not self.workbench.project_watch.problem:
                needs = project.needs(project.stage(name))
            missing = [need for need in needs if project and not project.artifact(need).is_dir()]
            if missing:
                self.warn(f"{name} needs {', '.join(missing)} first: press R to run all.")
            else:
                again = ["--force"] if force else []
                self.workbench.start_pipeline("repro", "--single-item", *again, name)
