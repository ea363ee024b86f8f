"""Results: which adapter to ship, then the sweep, reports and figures."""

from collections.abc import Iterable
from typing import Any, ClassVar

from textual import on, work
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.widget import Widget
from textual.widgets import ContentSwitcher, Static
from textual.worker import get_current_worker

from pipeline.adapters.config import CONFIG
from pipeline.project.stage_graph import Project
from pipeline.views.evaluations import Method, numbers_page
from pipeline.views.sweeps import Trial
from tui.dialogs import Reader
from tui.panes.table import Table
from tui.screens.base import WorkbenchScreen
from tui.screens.results import about
from tui.screens.results.figures import FiguresView
from tui.screens.results.methods_view import MethodsView
from tui.screens.results.reading import NO_SWEEP, NOTHING, Results, read_results
from tui.screens.results.reports_view import ReportsView
from tui.screens.results.sweep_view import SweepView
from tui.screens.results.view import View
from tui.services.evaluation import Evaluation as Evaluator
from tui.shipping import ship

VIEWS = {"methods": "All methods", "sweep": "Sweep", "report": "Report", "figures": "Figures"}
KEYS = dict(zip(VIEWS, "awrf", strict=True))
# what another screen asks for → the view that has it
HOLDERS = {"method": "methods", "report": "report", "figure": "figures"}


class ResultsScreen(WorkbenchScreen):
    """Reads what the stages wrote in a thread, each time that a file of theirs changed."""

    NAME = "results"
    CSS_PATH = "results.tcss"
    AUTO_FOCUS = "#methods Table"
    PANES = about.PANES
    HELP = """\
Which adapter to ship, in one look: what each model **learned** against what it **kept**, with its
size and the limits that it breaks. `◂` marks the model that forgot least. The line below the
header has the other views:

- `a` all methods, `w` the sweep by its keys, `r` reports, `f` figures.

`c` prompts the model that the cursor is on beside its base. Everything is read from what `lora
evaluate` and the other stages wrote.
"""
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding(key, f"view('{view}')", VIEWS[view], id=f"results.{view}", show=False)
        for view, key in KEYS.items()
    ]

    def __init__(self) -> None:
        super().__init__()
        self.results = Results()
        self.evaluator: Evaluator | None = None  # of adapters that the pipeline does not evaluate
        self._chosen = False  # whether the user chose the view
        self._wanted: dict[str, Any] = {}  # what another screen asked for, until it is read
        self.methods, self.reports, self.figures = MethodsView(), ReportsView(), FiguresView()
        self.views: dict[str, View] = {
            "methods": self.methods,
            "sweep": SweepView(),
            "report": self.reports,
            "figures": self.figures,
        }
        self.switcher = ContentSwitcher(*self.views.values(), initial="methods-view")

    def body(self) -> Iterable[Widget]:
        yield Static(id="views")
        yield self.switcher

    def on_mount(self) -> None:
        self._show()

    def on_unmount(self) -> None:
        if self.evaluator:
            self.evaluator.stop()

    # Reading

    def project_changed(self) -> None:
        watch = self.workbench.project_watch
        if watch.project:
            self._read(watch.project)
        elif self.results.seen is None and watch.problem:
            self._take(Results(watch.problem))

    @work(thread=True, exclusive=True, group="results")
    def _read(self, project: Project) -> None:
        worker = get_current_worker()
        for results in read_results(project, self.results):
            if not worker.is_cancelled:
                self.app.call_from_thread(self._take, results)

    def _take(self, results: Results) -> None:
        is_first, self.results = self.results.seen is None, results
        only_sweeps = results.evaluation == NOTHING and results.sweep != NO_SWEEP
        if is_first and only_sweeps and not self._chosen:
            self._switch("sweep")
        self._show()
        self._open_wanted()

    def open_with(self, **request: Any) -> None:
        """`view`, `method`, `report` (a stage) or `figure`: shows it."""
        self._wanted = request
        self._open_wanted()

    def _open_wanted(self) -> None:
        if self.results.seen is None:
            return
        wanted, self._wanted = self._wanted, {}
        for key, value in wanted.items():
            view = HOLDERS.get(key, value)
            if view in VIEWS:
                self.action_view(view)
                self.views[view].point(value)

    # Views

    @property
    def view(self) -> str:
        """The view that is shown."""
        return (self.switcher.current or "").removesuffix("-view")

    def action_view(self, view: str) -> None:
        """Show a view; the figures from a report begin with its own."""
        page = self.reports.table.pointed if self.view == "report" else None
        self._chosen = True
        self._switch(view)
        if view == "figures" and page:
            self.figures.point(page.folder)

    def _switch(self, view: str) -> None:
        self.switcher.current = f"{view}-view"
        self._show()
        self.give_focus(self.views[view].table)

    def _show(self) -> None:
        self.query_one("#views", Static).update(self._views_line())
        self.views[self.view].fill(self.results)
        self.refresh_bindings()  # the bottom line leaves out what a border shows by now

    def _views_line(self) -> Content:
        """The views, each with its key; a click shows one."""
        parts = []
        for view, label in VIEWS.items():
            if view == "sweep" and self.results.sweep == NO_SWEEP:
                continue
            style = "reverse bold" if view == self.view else ""
            key = f"[{style or 'bold $accent'}] {KEYS[view]}[/]"
            text = f"[{style or 'not bold'}] {label.lower()} [/]"
            parts.append(f"[@click=\"screen.view('{view}')\"]{key}{text}[/]")
        return Content.from_markup(" ".join(parts))

    def action_axis(self, axis: str) -> None:
        self.methods.choose_axis(axis)

    async def action_pixels(self) -> None:
        kind = await self.figures.draw_otherwise()
        self.notify(f"Pictures as {kind}.", markup=False)

    def action_figure_numbers(self) -> None:
        picture = self.figures.table.pointed
        if picture and picture.numbers:
            self.figures.show_numbers(picture, self.workbench.root)
        elif picture:
            self.warn(f"No numbers were written beside {picture.path.name}.")

    # What is asked of the model or adapter that the cursor is on

    @on(Table.Opened, "#methods Table, #sweep Table")
    def _row_opened(self) -> None:
        self.action_ask("chat")

    def action_ask(self, what: str) -> None:
        row = self.views[self.view].table.pointed
        if not isinstance(row, Method | Trial):
            return
        match what:
            case "chat":
                self._chat(row)
            case "curve" if row.run:
                self.workbench.go("curves", run=row.run)
            case "curve":
                self.warn(f"{row.name} was not trained, so it has no curve.")
            case "ship":
                self._ship(row)
            case "numbers" if isinstance(row, Method):
                self.app.push_screen(Reader(numbers_page(row), row.name))
            case "evaluate":
                self._evaluate(row)

    def _chat(self, row: Method | Trial) -> None:
        if row.path.is_dir():
            self.workbench.go("chat", models=list(filter(None, (row.base, row.path))))
        else:
            self.warn(f"{row.name} has no weights here. Press R to train it.")

    @work(group="ship")
    async def _ship(self, row: Method | Trial) -> None:
        """Export an adapter for another program."""
        if (row.path / CONFIG).is_file():
            await ship(self.workbench, row.name, row.path)
        else:
            self.warn(f"Only adapters are exported; {row.name} is none.")

    @work(group="evaluate")
    async def _evaluate(self, row: Method | Trial) -> None:
        """Evaluate again; by itself what the pipeline does not evaluate."""
        project = self.workbench.project_watch.project
        if project and isinstance(row, Method) and row.stage.name in project.readable:
            self.workbench.start_pipeline("repro", "evaluate")
            return
        with self.workbench.errors_shown():
            self.evaluator = self.evaluator or Evaluator(self.workbench.params_path)
            running = self.evaluator.run([row.path])
            self.workbench.log_message(f"Evaluating {row.name} …")
            problems = await running
            if problems:
                self.warn(problems)
            else:
                self.workbench.log_message(f"Evaluated: {row.name}.")
            self.project_changed()
