"""The sweep: its adapters in a table, and their losses against each key that it varied."""

from collections.abc import Iterable

from textual import on
from textual.containers import ItemGrid
from textual.widget import Widget

from pipeline.views.sweeps import Trial
from tui.panes.plot.plot import Plot
from tui.panes.table import Table
from tui.screens.results import sweep
from tui.screens.results.reading import Results
from tui.screens.results.view import View

PLOT_WIDTH = 36  # cells of a plot, at least


class SweepView(View):
    def __init__(self) -> None:
        super().__init__(id="sweep-view")
        self.table = Table[Trial](key=lambda trial: trial.name)
        self.table.sorted_by = "loss"
        self.grid = ItemGrid(min_column_width=PLOT_WIDTH)
        self.plots: list[Plot] = []

    def compose(self) -> Iterable[Widget]:
        yield self.pane("sweep", self.table)
        yield self.pane("plots", self.grid)

    def show_results(self, results: Results) -> None:
        found, is_first = results.sweep, not self.table.rows
        if isinstance(found, str):
            self.table.nothing = found
            self.table.show([])
            return
        self.table.show(found.trials, list(sweep.columns(found)))
        best = next((trial.name for trial in found.trials if trial.best), "")
        if is_first:
            self.point(best)
        self.titled("sweep", *sweep.facts(found))

    @on(Table.Pointed)
    def pointed(self, event: Table.Pointed) -> None:
        found = self.results.sweep
        if isinstance(found, str):
            return
        keys = sweep.plots(found) or [""]
        empty = "No adapter has a loss to draw." if keys[0] else "All have the same settings."
        for _ in keys[len(self.plots) :]:
            self.plots.append(Plot())
            self.grid.mount(self.plots[-1])
        for plot in self.plots[len(keys) :]:
            plot.display = False
        for plot, key in zip(self.plots, keys, strict=False):
            plot.display = True
            plot.show(*sweep.plot(found, key, event.row.name), empty=empty)
