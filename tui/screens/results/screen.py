"""Results: which adapter to ship, then the sweep, reports and figures."""

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from textual import on, work
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.widget import Widget
from textual.widgets import ContentSwitcher
from textual.worker import get_current_worker

from pipeline.adapters.config import CONFIG
from pipeline.project.stage_graph import Project
from pipeline.views.evaluations import Evaluation, Method
from pipeline.views.reports import numbers_of
from pipeline.views.sweeps import Sweep, Trial
from tui.dialogs import Menu
from tui.screens.base import WorkbenchScreen
from tui.screens.results.figures import FiguresView
from tui.screens.results.methods import DetailPane, MethodsPane, ScatterPane, fields
from tui.screens.results.pages import PageReader, PagesView
from tui.screens.results.reading import Results, read_results
from tui.screens.results.rows import RowsPane
from tui.screens.results.sweep import PlotsPane, SweepPane
from tui.screens.results.views import Views
from tui.services.evaluation import Evaluation as Evaluator
from tui.shipping import ship

MAX_FILES = 8  # whose numbers are shown at a time


class ResultsScreen(WorkbenchScreen):
    """Reads what the stages wrote in a thread, each time that a file of theirs changed."""

    NAME = "results"
    CSS_PATH = "results.tcss"
    AUTO_FOCUS = "MethodsPane Table"
    HELP = """\
Which adapter to ship, in one look: what each model **learned** against what it **kept**, with its size and the
limits that it breaks. `◂` marks the model that forgot least. The line below the header has the other views:

- `a` all methods, `w` the sweep by its keys, `r` reports, `f` figures.

`c` prompts the model that the cursor is on beside its base. Everything is read from what `lora evaluate` and the
other stages wrote.
"""
    LABELS: ClassVar[dict[str, str]] = {
        "methods": "all methods",
        "sweep": "sweep",
        "report": "report",
        "figures": "figures",
    }
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("a", "view('methods')", "All methods", id="results.methods", show=False),
        Binding("w", "view('sweep')", "The sweep", id="results.sweep", show=False),
        Binding("r", "view('report')", "The report", id="results.report", show=False),
        Binding("f", "view('figures')", "Figures", id="results.figures", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self.results = Results()
        self.evaluation: Evaluator | None = None  # of adapters that the pipeline does not evaluate
        self._filled: dict[str, Results] = {}  # view → what it shows
        self._chosen = False  # whether the user chose the view
        self._wanted: dict[str, str] = {}  # what another screen asked for, until it is read

    def body(self) -> Iterable[Widget]:
        yield Views()
        with ContentSwitcher(initial="methods"):
            with Horizontal(id="methods"):
                yield ScatterPane()
                with Vertical(id="side"):
                    yield MethodsPane()
                    yield DetailPane()
            with Horizontal(id="sweep"):
                yield SweepPane()
                yield PlotsPane()
            yield PagesView(
                "Reports",
                "No report yet. Press R to run the pipeline.",
                "The reports that there are.",
                "report",
            )
            yield FiguresView("figures")

    def on_mount(self) -> None:
        self.app.theme_changed_signal.subscribe(self, lambda _: self._show_again())
        self._show()

    def _show_again(self) -> None:
        """Fill the views anew: in other colours, or with another problem."""
        self._filled.clear()
        self._show()

    # Reading

    def project_changed(self) -> None:
        if project := self.workbench.project_watch.project:
            self._read(project)
        else:
            self._show_again()

    @work(thread=True, exclusive=True, group="results")
    def _read(self, project: Project) -> None:
        worker = get_current_worker()
        for results in read_results(project, self.results):
            if not worker.is_cancelled:
                self.app.call_from_thread(self._take, results)

    def _take(self, results: Results) -> None:
        first = self.results == Results()
        self.results = results
        if first and results.evaluation is None and results.sweep is not None and not self._chosen:
            self._switch("sweep")  # a project that only sweeps
        self._show()
        if results.seen is not None:
            self.query_one(PagesView).refresh_page()
            self._open_wanted()

    def _show(self) -> None:
        """Show what was read, in the view that is on; the others are filled when they are shown."""
        results, switcher = self.results, self.query_one(ContentSwitcher)
        views = self.query_one(Views)
        found = {
            "sweep": results.sweep is not None,
        }
        shown = [view for view in self.LABELS if found.get(view, True)]
        views.entries = tuple((view, self._key(view), self.LABELS[view]) for view in shown)
        views.current = view = switcher.current or ""
        if self._filled.get(view) is results:
            return
        self._filled[view] = results
        match view:
            case "methods":
                self._show_methods(results.evaluation)
            case "sweep":
                self.query_one(SweepPane).show(results.sweep)
                self.query_one(PlotsPane).show(
                    results.sweep if isinstance(results.sweep, Sweep) else None
                )
            case "report":
                self.query_one(PagesView).show(results.pages)
            case "figures":
                self.query_one(FiguresView).show(results.pictures)
        self.refresh_bindings()  # the bottom line leaves out what a border shows by now

    def _show_methods(self, evaluation: Evaluation | str | None) -> None:
        if self.results == Results() and self.workbench.project_watch.project:
            evaluation = "Reading the evaluation …"
        elif evaluation is None and (problem := self.workbench.project_watch.problem):
            evaluation = problem
        shown = evaluation if isinstance(evaluation, Evaluation) else None
        self.query_one("#methods").set_class(shown is None, "-empty")
        self.query_one(MethodsPane).show(evaluation)
        pointed = self.query_one(MethodsPane).pointed
        self.query_one(ScatterPane).show(shown, pointed.name if pointed else "")

    def _key(self, view: str) -> str:
        binding = next(
            b for b in self.BINDINGS if isinstance(b, Binding) and b.action == f"view('{view}')"
        )
        keys = [
            key for key, bound in self.active_bindings.items() if bound.binding.id == binding.id
        ]
        return keys[0] if keys else binding.key

    # Views

    def _switch(self, view: str) -> None:
        self.query_one(ContentSwitcher).current = view
        self._show()
        first = next(
            (
                w
                for w in self.query_one(f"#{view}").query("Table, VimList").results(Widget)
                if w.focusable
            ),
            None,
        )
        self.set_focus(first)

    def action_view(self, view: str) -> None:
        """Show a view; the figures from a report begin with its own."""
        before = self.query_one(ContentSwitcher).current
        self._chosen = True
        self._switch(view)
        if view == "figures" and before == "report":
            self.query_one(FiguresView).point(self.query_one(PagesView).folder)

    def open_with(self, **request: Any) -> None:
        """`view`, `method`, `report` (a stage) or `figure`: shows it."""
        self._wanted = {key: str(value) for key, value in request.items()}
        if self.results.seen is not None:
            self._open_wanted()

    def _open_wanted(self) -> None:
        wanted, self._wanted = self._wanted, {}
        views = {"method": "methods", "report": "report", "figure": "figures"}
        view = wanted.get("view") or next((views[key] for key in wanted if key in views), "")
        if view in self.LABELS:
            self.action_view(view)
        if method := wanted.get("method"):
            self.query_one(MethodsPane).point(method)
        if report := wanted.get("report"):
            self.query_one(PagesView).point(report)
        if figure := wanted.get("figure"):
            self.query_one(FiguresView).point(figure)

    # What the panes ask

    @on(RowsPane.Pointed)
    def _row_pointed(self, event: RowsPane.Pointed) -> None:
        row = event.row
        if isinstance(row, Method) and isinstance(self.results.evaluation, Evaluation):
            self.query_one(DetailPane).show(row, self.results.evaluation)
            self.query_one(ScatterPane).point(row.name)
        elif isinstance(row, Trial):
            self.query_one(PlotsPane).point(row.name)

    @on(RowsPane.Asked)
    def _row_asked(self, event: RowsPane.Asked) -> None:
        row, what = event.row, event.what
        if what in ("chat", "enter"):
            self._chat(row)
        elif what == "open" and isinstance(row, Method) and not row.stage.trains:
            self.warn(f"{row.name} was not trained, so it has no curve.")
        elif what == "open":
            run = row.stage.name if isinstance(row, Method) else f"finetune_sweep/{row.name}"
            self.workbench.go("curves", run=run)
        elif what == "ship":
            self._ship(row)
        elif what == "fields":
            self.app.push_screen(PageReader(fields(row), row.name))
        elif what == "evaluate" and (isinstance(row, Trial) or row.stage.name not in self._listed):
            self._evaluate(row)
        elif what == "evaluate":
            self.workbench.start_pipeline("repro", "evaluate")

    @property
    def _listed(self) -> Collection[str]:
        """The stages that the pipeline runs."""
        project = self.workbench.project_watch.project
        return project.readable if project else ()

    @work(group="ship")
    async def _ship(self, row: Method | Trial) -> None:
        """Export an adapter for another program."""
        if (row.path / CONFIG).is_file():
            await ship(self.workbench, row.name, row.path)
        else:
            self.warn(f"Only adapters are exported; {row.name} is none.")

    @work(group="evaluate")
    async def _evaluate(self, trial: Trial | Method) -> None:
        """Measure what an adapter that the pipeline does not evaluate learned and kept."""
        with self.workbench.errors_shown():
            self.evaluation = self.evaluation or Evaluator(self.workbench.params_path)
            running = self.evaluation.run([trial.path])
            self.workbench.log_message(f"Evaluating {trial.name} …")
            problems = await running
            self.workbench.log_message(
                problems or f"Evaluated: {trial.name}.", "warning" if problems else "information"
            )
            self.project_changed()

    def on_unmount(self) -> None:
        if self.evaluation:
            self.evaluation.stop()

    def _chat(self, row: Method | Trial) -> None:
        base = (
            row.base
            if isinstance(row, Method)
            else self.results.sweep.base
            if isinstance(self.results.sweep, Sweep)
            else None
        )
        if not row.path.is_dir():
            self.warn(f"{row.name} has no weights here. Press R to train it.")
            return
        self.workbench.go("chat", models=[*([base] if base else []), row.path])

    @on(ScatterPane.Chosen)
    def _choose_axis(self, event: ScatterPane.Chosen) -> None:
        pane, axis = self.query_one(ScatterPane), event.axis
        choices = {measure.name: measure.name for measure in pane.measures(axis)}
        title = "To the right" if axis == "x" else "Upwards"

        def chosen(name: str | None) -> None:
            if name:
                pane.set_axis(axis, name)

        self.app.push_screen(
            Menu(title, choices, pane.axes[axis].name if axis in pane.axes else ""), chosen
        )

    # Numbers

    @on(FiguresView.Numbers)
    def _show_figure_numbers(self, event: FiguresView.Numbers) -> None:
        if event.picture.numbers:
            self._show_numbers(event.picture.title, event.picture.numbers)
        else:
            self.warn(f"No numbers were written beside {event.picture.path.name}.")

    @work(thread=True, exclusive=True, group="numbers")
    def _show_numbers(self, title: str, files: Sequence[Path]) -> None:
        project = self.workbench.project_watch.project
        root = project.root if project else Path()
        text = "\n".join(numbers_of(path, root) for path in files[:MAX_FILES])
        self.app.call_from_thread(self.app.push_screen, PageReader(text, title))
