"""The sweep: its adapters in a table, and their losses against each key that it varied."""

from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import Any

from textual import on
from textual.containers import ItemGrid
from textual.content import Content
from textual.widget import Widget

from pipeline.evaluation.comparison import MISSING
from pipeline.files.text import natural_sort_key
from pipeline.views.sweeps import Sweep, Trial, value_text
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
FORMS = {"loss": "{:.4f}", DIVERGENCE: "{:.4f}", "kept": "{:.0%}", "trainable": "{:,}"}


class SweepView(View):
    FIELD = "sweep"

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
        self.table.show(found.trials, list(columns(found)))
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


def columns(sweep: Sweep) -> Iterator[Column[Trial]]:
    """The values of each adapter, its loss, its divergence from the base."""
    yield Column("adapter", _name, lambda trial: natural_sort_key(trial.name))
    yield from _numbers(sweep, "loss", DIVERGENCE)
    yield from map(_key_column, sweep.keys)
    yield from _numbers(sweep, "kept", "trainable")
    yield Column("state", _state, lambda trial: trial.state)


def _numbers(sweep: Sweep, *names: str) -> Iterator[Column[Trial]]:
    """Columns of what was measured of any adapter."""
    for name in names:
        get, form = attrgetter(name), FORMS[name].format

        def cell(trial: Trial, get: Any = get, form: Any = form) -> str:
            return MISSING if get(trial) is None else form(get(trial))

        if any(get(trial) is not None for trial in sweep.trials):
            title = "trained" if name == "trainable" else name
            yield Column(title, cell, get, right=True, largest_first=name == "kept")


def _key_column(key: str) -> Column[Trial]:
    def order(trial: Trial) -> Any:
        """Numbers by size, else texts; a column never mixes them, as a key has one type."""
        value = trial.values.get(key)
        return value if isinstance(value, int | float) else value_text(value)

    return Column(key, lambda trial: value_text(trial.values.get(key)), order, right=True)


def _name(trial: Trial) -> Content:
    parts = [Content(trial.name).truncate(MAX_NAME, ellipsis=True)]  # its values stand beside it
    parts += [Content.styled(f" {FRONT}", "$accent")] * trial.front
    parts += [Content.styled(f" {BEST}", "bold $success")] * trial.best
    return Content.assemble(*parts)


def _state(trial: Trial) -> Content:
    return Content.styled(trial.state, "$error" if trial.state == "diverged" else "")


def plotted(sweep: Sweep, key: str, pointed: Trial) -> tuple[list[Point], Axis, Axis]:
    """The points of a plot and its axes; better is to the right and upwards."""

    def value(trial: Trial) -> Any:
        return trial.divergence if key == DIVERGENCE else trial.values.get(key)

    trials = [each for each in sweep.trials if None not in (each.loss, value(each))]
    trials.sort(key=lambda trial: (trial is not pointed, not trial.best, not trial.front))
    tried = [value(trial) for trial in trials]
    if key == DIVERGENCE:
        x = Axis("divergence from the base", log=None, falls=True)
    elif all(isinstance(each, int | float) for each in tried):
        x = Axis(key, log=None, marks=[(each, value_text(each)) for each in sorted(set(tried))])
    else:
        names = sorted(set(map(value_text, tried)))
        x = Axis(key, (-0.5, len(names) - 0.5), marks=list(enumerate(names)))
        tried = [names.index(value_text(each)) for each in tried]
    points = [_point(trial, at, trial is pointed) for trial, at in zip(trials, tried, strict=True)]
    return points, x, Axis("loss, less is better", log=None, falls=True)


def _point(trial: Trial, x: float, pointed: bool) -> Point:
    style = look_style(method_look("sweep"))
    if trial.best:
        style = f"bold {style}"
    elif not (pointed or trial.front):
        style = f"{style} dim"
    sign, label = FRONT if trial.front else "●", trial.name if pointed else ""
    return Point(x, trial.loss or 0.0, sign, label, style, pointed)
