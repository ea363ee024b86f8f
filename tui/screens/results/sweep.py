"""The sweep: its adapters in a table, and their losses against each key that it varied."""

from collections.abc import Iterable
from functools import partial
from typing import Any

from textual import on
from textual.containers import ItemGrid
from textual.content import Content
from textual.widget import Widget

from pipeline.evaluation.comparison import MISSING
from pipeline.files.text import natural_sort_key
from pipeline.views.sweeps import Sweep, Trial, value_text
from tui.panes.numbers import numbers
from tui.panes.plot.plot import Plot
from tui.panes.plot.series import Axis, Point
from tui.panes.table import Column, Table
from tui.screens.results.about import BEST, FRONT
from tui.screens.results.view import View
from tui.widgets.colors import look_style, method_look

MAX_NAME = 28  # cells
PLOT_WIDTH = 36  # cells of a plot, at least
DIVERGENCE = "divergence"
NOTHING = "There is nothing to draw: no adapter has a loss, or all have the same settings."


class SweepView(View):
    def __init__(self) -> None:
        super().__init__(id="sweep-view")
        self.table = Table[Trial](key=lambda trial: trial.name)
        self.table.sorted_by = "loss"
        self.grid = ItemGrid(min_column_width=PLOT_WIDTH)

    def compose(self) -> Iterable[Widget]:
        yield self.pane("sweep", self.table)
        yield self.pane("plots", self.grid)

    def show_found(self) -> None:
        found, is_first = self.found, not self.table.rows
        self.table.show(found.trials, columns(found))
        if is_first:
            self.table.point(next((trial.name for trial in found.trials if trial.best), ""))
        edge = f"best at the edge: {', '.join(found.edges)}" if found.edges else ""
        loss = "held-out loss" if found.held_out else "training loss: no data is held out"
        self.titled("sweep", edge, f"{len(found.trials)} adapters", loss)
        keys = [*[DIVERGENCE] * found.diverges, *found.keys] or [""]
        self.plots = {key: Plot() for key in keys}
        self.grid.remove_children()
        self.grid.mount(*self.plots.values())

    @on(Table.Pointed)
    def pointed(self, event: Table.Pointed) -> None:
        if self.table.rows:  # still
            for key, plot in self.plots.items():
                plot.show(*plotted(self.found, key, event.row), empty=NOTHING)


def columns(sweep: Sweep) -> list[Column[Trial]]:
    """The values of each adapter, its loss, its divergence from the base."""
    found: list[Column[Trial]] = [
        Column("adapter", _name, lambda trial: natural_sort_key(trial.name)),
        numbers("loss", lambda trial: trial.loss, "{:.4f}".format),
        numbers(DIVERGENCE, lambda trial: trial.divergence, "{:.4f}".format),
        *(numbers(key, partial(_value, key), value_text) for key in sweep.keys),
        numbers("kept", lambda trial: trial.kept, "{:.0%}".format, largest_first=True),
        numbers("trained", lambda trial: trial.trainable, "{:,}".format),
        Column("state", _state, lambda trial: trial.state),
    ]
    return [each for each in found if any(each.cell(t) != MISSING for t in sweep.trials)]


def _value(key: str, trial: Trial) -> Any:
    """A number, else a text; a column never mixes them, as a key has one type."""
    value = trial.divergence if key == DIVERGENCE else trial.values.get(key)
    return value if value is None or isinstance(value, int | float) else value_text(value)


def _name(trial: Trial) -> Content:
    parts = [Content(trial.name).truncate(MAX_NAME, ellipsis=True)]  # its values stand beside it
    parts += [Content.styled(f" {FRONT}", "$accent")] * trial.front
    parts += [Content.styled(f" {BEST}", "bold $success")] * trial.best
    return Content.assemble(*parts)


def _state(trial: Trial) -> Content:
    return Content.styled(trial.state, "$error" if trial.state == "diverged" else "")


def plotted(sweep: Sweep, key: str, pointed: Trial) -> tuple[list[Point], Axis, Axis]:
    """The points of a plot and its axes; better is to the right and upwards."""
    trials = [each for each in sweep.trials if None not in (each.loss, _value(key, each))]
    trials.sort(key=lambda trial: (trial is not pointed, not trial.best, not trial.front))
    tried = [_value(key, trial) for trial in trials]
    names = sorted({value for value in tried if isinstance(value, str)})
    if key == DIVERGENCE:
        x = Axis("divergence from the base", log=None, falls=True)
    elif names:
        x = Axis(key, (-0.5, len(names) - 0.5), marks=list(enumerate(names)))
        tried = list(map(names.index, tried))
    else:
        x = Axis(key, log=None, marks=[(each, value_text(each)) for each in sorted(set(tried))])
    points = [_point(trial, at, trial is pointed) for trial, at in zip(trials, tried, strict=True)]
    return points, x, Axis("loss, less is better", log=None, falls=True)


def _point(trial: Trial, x: float, pointed: bool) -> Point:
    style = "" if pointed or trial.front else " dim"
    style = f"{look_style(method_look('sweep'))}{' bold' if trial.best else style}"
    sign, label = FRONT if trial.front else "●", trial.name if pointed else ""
    return Point(x, trial.loss or 0.0, sign, label, style, pointed)
