"""Results: which adapter to ship, then the sweep, reports and figures."""

import asyncio
from collections.abc import Iterable
from typing import Any, ClassVar

from textual import on, work
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.reactive import var
from textual.widget import Widget
from textual.widgets import ContentSwitcher, Static

from pipeline.adapters.config import CONFIG
from pipeline.views.evaluations import Method, numbers_page
from pipeline.views.reports import numbers_of
from pipeline.views.sweeps import Trial
from tui.dialogs import Reader
from tui.panes.table import Table
from tui.screens.base import WorkbenchScreen
from tui.screens.results import about
from tui.screens.results.methods import MethodsView
from tui.screens.results.pages import FiguresView, ReportsView
from tui.screens.results.reading import NOTHING, read_results, stamps
from tui.screens.results.sweep import SweepView
from tui.screens.results.view import View
from tui.services.evaluation import Evaluation as Evaluator
from tui.shipping import ship

VIEWS = {"methods": "all methods", "sweep": "sweep", "report": "report", "figures": "figures"}
KEYS = dict(zip(VIEWS, "awrf", strict=True))
MAX_FILES = 8  # whose numbers are shown at a time


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
        Binding(key, f"view('{view}')", VIEWS[view].capitalize(), id=f"results.{view}", show=False)
        for view, key in KEYS.items()
    ]

    view = var("methods", init=False)  # that is shown

    def __init__(self) -> None:
        super().__init__()
        self.results: dict[str, Any] = {**NOTHING, "methods": "Reading the evaluation …"}
        self.seen: object = None  # stamps of all files, once all were read
        self.evaluator = Evaluator(self.workbench.params_path)  # of what the pipeline does not
        self.methods, self.reports, self.figures = MethodsView(), ReportsView(), FiguresView()
        views: list[View] = [self.methods, SweepView(), self.reports, self.figures]
        self.views = dict(zip(VIEWS, views, strict=True))
        self.switcher = ContentSwitcher(*views, initial="methods-view")

    def body(self) -> Iterable[Widget]:
        yield Static(id="views")
        yield self.switcher

    def on_unmount(self) -> None:
        self.evaluator.stop()

    # Reading

    def project_changed(self) -> None:
        self._read()

    @work(exclusive=True, group="results")
    async def _read(self) -> None:
        """Read what the stages wrote, and show it."""
        watch, is_first = self.workbench.project_watch, self.seen is None
        if watch.project:
            seen = await asyncio.to_thread(stamps, watch.project)
            if seen != self.seen:
                self.results = await asyncio.to_thread(read_results, watch.project)
                self.seen = seen
        elif is_first and watch.problem:
            self.results = {**NOTHING, "methods": watch.problem}
        is_evaluated = self.results["methods"] != NOTHING["methods"]
        if is_first and self._has_sweep() and not is_evaluated:
            self.view = "sweep"
        self._show()

    def _has_sweep(self) -> bool:
        return bool(self.results["sweep"] != NOTHING["sweep"])

    # Views

    def action_view(self, view: str) -> None:
        """Show a view; the figures from a report begin with its own."""
        page = self.reports.table.pointed if self.view == "report" else None
        self.view = view
        if view == "figures" and page:
            self.figures.point(page.folder)

    def watch_view(self, view: str) -> None:
        self.switcher.current = f"{view}-view"
        self._show()
        self.give_focus(self.views[view].table)

    def _show(self) -> None:
        self.query_one("#views", Static).update(self._views_line())
        self.views[self.view].fill(self.results[self.view])
        self.refresh_bindings()  # the bottom line leaves out what a border shows by now

    def _views_line(self) -> Content:
        """The views, each with its key; a click shows one."""
        parts = []
        for view, label in VIEWS.items():
            style = "reverse bold" if view == self.view else ""
            key = f"[{style or 'bold $accent'}] {KEYS[view]}[/]"
            text = f"[{style or 'not bold'}] {label} [/]"
            if view != "sweep" or self._has_sweep():
                parts.append(f"[@click=\"screen.view('{view}')\"]{key}{text}[/]")
        return Content.from_markup(" ".join(parts))

    def action_axis(self, axis: str) -> None:
        self.methods.choose_axis(axis)

    def action_pixels(self) -> None:
        self.notify(f"Pictures as {self.figures.draw_otherwise()}.", markup=False)

    @work
    async def action_figure_numbers(self) -> None:
        picture, root = self.figures.table.pointed, self.workbench.root
        if not picture:
            return
        pages = (numbers_of(path, root) for path in picture.numbers[:MAX_FILES])
        text = await asyncio.to_thread("\n".join, pages)
        page = text or f"No numbers were written beside {picture.path.name}."
        self.app.push_screen(Reader(page, picture.title))

    # What is asked of the model or adapter that the cursor is on

    @on(Table.Opened)
    def _row_opened(self) -> None:
        if self.view in ("methods", "sweep"):
            self.action_ask("chat")
        else:
            self.focus_next()  # the page

    def action_ask(self, what: str) -> None:
        row = self.views[self.view].table.pointed
        if isinstance(row, Method | Trial):
            getattr(self, f"_{what}")(row)

    def _curve(self, row: Method | Trial) -> None:
        if row.run:
            self.workbench.go("curves", run=row.run)
        else:
            self.warn(f"{row.name} was not trained, so it has no curve.")

    def _numbers(self, row: Method) -> None:
        self.app.push_screen(Reader(numbers_page(row), row.name))

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
            self.workbench.log_message(f"Evaluating {row.name} …")
            if problems := await self.evaluator.run([row.path]):
                self.warn(problems)
            else:
                self.workbench.log_message(f"Evaluated: {row.name}.")
            self.project_changed()
