"""The curves screen: what every run logs over its steps, live."""

import asyncio
from collections.abc import Iterable, Sequence
from pathlib import Path
from time import monotonic
from typing import Any, ClassVar

from textual import on, work
from textual.binding import BindingType
from textual.containers import Container, Vertical
from textual.content import Content
from textual.widget import Widget

from pipeline.views.curves import Runs, RunView
from tui.dialogs import Reader, ask_file
from tui.panes.pane import Pane
from tui.panes.plot.plot import Plot
from tui.panes.table import Column, Table
from tui.panes.text import Text
from tui.screens.base import HUGE, TALL, WIDE, WorkbenchScreen
from tui.screens.curves import about, export, words
from tui.screens.curves.plots import Plots
from tui.screens.curves.words import Row, best_of

EMPTY = "No runs yet. R runs the pipeline; each training stage then has its curve here."
SMOOTHING = 0.9  # initial
FIRST = "lora"  # the method whose newest run is looked at first
DELAY = 1.0  # seconds between two drawings of runs that grow: training needs the processor
# from 76 columns on there is room for the list beside the chart, from 32 rows on for small plots
WIDTHS = [(0, "-tiny"), (76, "-narrow"), (WIDE, "-wide"), (HUGE, "-huge")]
HEIGHTS = [(0, "-short"), (TALL, "-low"), (32, "-high")]


class CurvesScreen(WorkbenchScreen):
    """Reads the logs of runs as they grow, and draws those that are on."""

    NAME = "curves"
    PANES = about.PANES
    HELP = about.HELP
    CSS_PATH = "curves.tcss"
    AUTO_FOCUS = "#runs Table"
    HORIZONTAL_BREAKPOINTS = WIDTHS
    VERTICAL_BREAKPOINTS = HEIGHTS
    BINDINGS: ClassVar[list[BindingType]] = about.KEYS

    def __init__(self) -> None:
        super().__init__()
        self.runs = Runs(self.workbench.root, self.workbench.params_path, SMOOTHING)
        self._wanted = ""  # a run that another screen asked for, until it is found
        self.is_reading = self.is_stale = False  # a file may have changed since it was read
        self._next_reading = 0.0
        self._answers: bool | None = None  # whether they are shown, if the user has said so
        # They are attributes, as messages can arrive while the screen closes.
        self.plots, self.details, self.answers = Plots(self.runs), Text(), Text()
        self.table = Table[Row](
            key=lambda row: row.key,
            columns=[
                Column("run", lambda row: self._cells(row)[0], fills=True),
                Column("loss", lambda row: self._cells(row)[1], right=True),
                Column("kept", lambda row: self._cells(row)[2]),
            ],
            parent=words.parent,
            titles=False,
            sideways=False,
        )

    def body(self) -> Iterable[Widget]:
        with Container(id="panes"):
            yield self.plots
            with Vertical(id="side"):
                yield self.pane("runs", self.table)
                yield self.pane("run", self.details)
                yield self.pane("answers", self.answers)

    # Reading

    def watched(self) -> Iterable[Path]:
        return self.runs.files(self.workbench.project_watch.project)

    def files_changed(self) -> None:
        self.is_stale = True
        self._read()

    project_changed = files_changed

    def tick(self) -> None:
        """What was not due is by now; a run whose process was killed changes no file."""
        if self.is_stale or any(view.alive for view in self.runs.views.values()):
            self._read()

    @work
    async def _read(self) -> None:
        """Read what has changed, if it is time, and show it."""
        if not self.is_current or self.is_reading:
            return
        self.is_reading, self.is_stale = True, False
        try:
            if await self._has_changed():
                self._show()
        finally:
            self.is_reading = False
        self._find_wanted()

    async def _has_changed(self) -> bool:
        """Read runs, and what those that are on logged, if it is time: whether that is to be drawn."""
        states = self.workbench.project_watch.states.items()
        now = [(name, state.state) for name, state in states]
        found = await asyncio.to_thread(self.runs.look, now)
        if not found and monotonic() < self._next_reading:
            self.is_stale = True
            return False
        self._next_reading = monotonic() + DELAY
        changed = [await view.read() for view in self.runs.on]
        return found or any(changed)

    def _read_now(self) -> None:
        """Draw, and read a run that is on now at once."""
        self._show()
        self._next_reading = 0.0
        self.files_changed()

    def open_with(self, run: str = "", **_: Any) -> None:
        """Show a run: its stage (the newest of it), its method, or `finetune_sweep/NAME` for an
        adapter of a sweep.
        """
        self._wanted = run
        self._find_wanted()

    def _find_wanted(self) -> None:
        """Point to the run that another screen asked for, once it is found."""
        name, _, adapter = self._wanted.partition("/")
        if name and (view := self.runs.find(name)):
            self._wanted = ""
            self.runs.switch(view, True)
            self._read_now()
            self.table.point(view.curves[adapter].key if adapter in view.curves else view.key)

    # What is shown

    def _cells(self, row: Row) -> Sequence[Content]:
        return words.cells(row, self.runs.on, self.table.folded)

    def _show(self) -> None:
        """Show everything."""
        views, before = self.runs.views, {row.key for row in self.table.rows}
        self.set_class(not views, "-empty")
        self.table.nothing = EMPTY
        self.table.folded |= views.keys() - before
        self.table.show(words.rows(views.values()))
        if not before:  # what is running, else the newest run of LoRA
            running = (view for view in views.values() if view.alive)
            first = next(running, self.runs.find(FIRST))
            self.table.point(first and first.key)
        facts = f"{len(self.runs.on)} of {len(views)} on · loss, kept"
        self.query_one("#runs", Pane).show_title(facts)
        self.draw()

    @on(Plot.Drawn, "#chart Plot")
    @on(Table.Pointed, "#runs Table")
    @on(Plots.Changed)
    def draw(self) -> None:
        """Draw the plots, and what is said of the runs at the step cursor."""
        pointed, step = best_of(self.table.pointed), self.plots.window.cursor
        self.plots.show(pointed)
        uppermost = reversed(self.plots.curves)  # the pointed one first
        loud = [curve for curve in uppermost if not self.plots.is_quiet(curve)]
        wanted = self.has_class("-high") if self._answers is None else self._answers
        self.set_class(self._has_answers() and wanted, "-answers")
        self.answers.show(words.answers(loud, step), again=True)
        self.details.show(lambda _: words.details(pointed, step) if pointed else (), again=True)
        self.refresh_bindings()

    def _has_answers(self) -> bool:
        return any(curve.answers for curve in self.runs.curves)

    # Runs

    @property
    def view(self) -> RunView | None:
        """The run that the cursor is on, or whose adapter it is on."""
        curve = best_of(self.table.pointed)
        return curve.view if curve else None

    @on(Table.Chosen, "#runs Table")
    def action_switch(self) -> None:
        """Switch the run, or the sweep of an adapter, on or off."""
        if view := self.view:
            self.runs.switch(view, view not in self.runs.on)
            self._read_now()

    @on(Table.Opened, "#runs Table")
    def action_open(self) -> None:
        """List a sweep's adapters, or no longer; show or hide any other run."""
        view = self.view
        if view is None or not view.run.sweeps:
            self.action_switch()
            return
        is_open = view.key not in self.table.folded
        self.table.fold(view.key, is_open)
        if not is_open:
            self.runs.switch(view, True)  # what is off is not read: adapters would have no numbers
        self._read_now()

    def action_info(self) -> None:
        """All that is known of the run, with its settings."""
        if curve := best_of(self.table.pointed):
            settings = [f"{key}  {value}" for key, value in curve.view.run.params.items()]
            facts = words.details(curve, self.plots.window.cursor)
            lines = [*facts, *map(Content, ["", *settings])]
            self.app.push_screen(Reader(lambda _: lines, "Run"))

    def action_stage(self) -> None:
        """The stage that the run is of."""
        if view := self.view:
            self.workbench.go("pipeline", stage=view.run.stage)

    def action_chat(self) -> None:
        """Talk with the model that the run made."""
        curve, project = best_of(self.table.pointed), self.workbench.project_watch.project
        if not curve or not project:
            return
        if model := curve.model(project):
            self.workbench.go("chat", models=[model])
        else:
            self.warn("This run has made no model yet.")

    # Keys

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action == "leave" and self.plots.offers("leave"):
            return True
        if action == "answers":
            return self._has_answers()
        if action == "plots":
            return self.plots.offers(str(parameters[0]))
        return super().check_action(action, parameters)

    def action_leave(self) -> None:
        """As everywhere; then what the plots can leave."""
        if super().check_action("leave", ()):
            super().action_leave()
        else:
            self.plots.leave()

    def action_plots(self, what: str, how: tuple[Any, ...] = ()) -> None:
        """A key of the plots: what they do, and how."""
        getattr(self.plots, what)(*how)

    def action_answers(self) -> None:
        """Show or hide what the runs answered."""
        self._answers = not self.has_class("-answers")
        self.draw()

    @work
    async def action_export(self) -> None:
        """Save the plots as a picture, or the runs that are on as numbers."""
        if not self.runs.logged():
            self.warn("There is nothing to export: no run that is on has logged a step.")
            return
        with self.workbench.errors_shown():
            ask = ask_file(self.workbench, export.QUESTION, "curves.svg", export.check)
            if path := await ask:
                runs = [view.run for view in self.runs.on]
                title = f"smoothing {self.runs.smoothing:g}"
                panels = self.plots.panels()
                await asyncio.to_thread(export.save, path, runs, panels, title)
                self.workbench.log_message(f"Exported to {path}.")
