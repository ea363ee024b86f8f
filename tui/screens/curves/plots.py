"""The plots: one metric large, the others small, what is constant as a number."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from textual import on, work
from textual.containers import ItemGrid, Vertical
from textual.content import Content
from textual.message import Message
from textual.widget import Widget
from textual.widgets import Static

from pipeline.project.logs.run_log import DIVERGED
from pipeline.views.curves import Curve, Runs
from pipeline.views.series import METRICS, Column
from tui.panes.pane import Pane
from tui.panes.plot.plot import Head, Plot
from tui.panes.plot.scale import Range, power_of_ten
from tui.panes.plot.series import XY, Axis, Line
from tui.screens.curves.about import PANES
from tui.widgets.colors import look_style

SMOOTHINGS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
WIDTH = 22  # cells of a small plot, at least
QUIET, BAND = "50%", "30%"  # of the colour, the rest is background
POINTS = 600  # of a line that is exported, at most


@dataclass(frozen=True)
class Window:
    """What is visible. `x` None: all steps; `y` None: all values; `log` None: where a decade is
    spanned. `following`: `x` moves with the newest step. `cursor`: the step at which values are read.
    """

    x: Range | None = None
    y: Range | None = None
    log: bool | None = None
    following: bool = False
    cursor: float | None = None


class Plots(Vertical):
    """Draws the curves that are on, in a window of steps and values that keys and the mouse change.

    `pointed`: the one that the list's cursor is on. A small plot is hidden while its metric is
    large or constant.
    """

    class Changed(Message):
        """The window, its cursor or the large metric is another."""

    def __init__(self, runs: Runs) -> None:
        super().__init__(id="plots")
        self.runs, self.window = runs, Window()
        self.metric = "loss"  # that of the large plot
        self.curves: Sequence[Curve] = ()  # the last is drawn on top
        self.pointed: Curve | None = None
        self.chart = Plot(can_zoom=True)
        self.small = {name: Plot(name=name) for name in METRICS}
        self.constants = Static(id="constants", markup=False)

    def compose(self) -> Iterable[Widget]:
        yield Pane(PANES["chart"], self.chart, id="chart")
        grid = ItemGrid(*self.small.values(), min_column_width=WIDTH)
        yield Pane(PANES["small"], grid, self.constants, id="small")

    @property
    def steps(self) -> Range:
        """The visible steps: all, the window's, or as many up to the newest step."""
        x, logs = self.window.x, [curve.log.steps for curve in self.runs.curves]
        ends = [end for steps in logs for end in (*steps[:1], *steps[-1:])]
        first, last = min(ends, default=0.0), max(ends, default=1.0)
        if x is None:
            return (first, last) if first < last else (first - 1, last + 1)
        return (last - (x[1] - x[0]), last) if self.window.following else x

    def is_quiet(self, curve: Curve) -> bool:
        """Whether it is another adapter of a sweep than its best and the pointed one."""
        return curve not in (curve.view.best, self.pointed)

    # What is drawn

    def show(self, pointed: Curve | None) -> None:
        """Draw the curves: the quiet ones, the others, those that run, the pointed one."""
        self.pointed, logged = pointed, self.runs.logged()
        self.curves = sorted(
            self.runs.curves, key=lambda c: (c is pointed, not self.is_quiet(c), c.view.alive)
        )
        if self.metric not in logged:
            self.metric = "loss"
        window, cursor = self.window, self.window.cursor
        x, y = Axis(range=self.steps), Axis(range=window.y, log=window.log)
        self.chart.show(partial(self._series, self.metric), x, y, cursor=cursor)
        title = METRICS[self.metric].title
        self.query_one("#chart", Pane).show_title(" · ".join(self._facts()), title=title)

        small, numbers = self._small_metrics(), []
        x, y = replace(x, shown=False), Axis(log=None)
        for name, plot in self.small.items():
            plot.display, head = name in small, self._head(name)
            if plot.display:
                plot.show(partial(self._series, name), x, y, cursor=cursor, head=head)
            elif name in logged and name != self.metric:
                numbers.append(Content.assemble((head.name, "bold"), f" {head.value}"))
        self.constants.update(Content("   ").join(numbers))
        self.constants.display = bool(numbers)

    def _series(self, metric: str, columns: int) -> list[Line]:
        lines = [self._line(curve, metric, columns) for curve in self.curves]
        if metric == self.metric:
            return lines
        return [replace(line, label="", value="", band=()) for line in lines]

    def _line(self, curve: Curve, metric: str, count: int) -> Line:
        """Its line of `count` columns; the pointed one has the band of its raw values."""
        steps, style = self.steps, look_style(curve.view.look)
        columns = curve.series(metric).visible(*steps, count)
        line = Line(
            _means(columns),
            style,
            sign=curve.view.look.sign,
            bold=curve is self.pointed,
            stray=curve.outcome == DIVERGED,
        )
        if self.is_quiet(curve):
            return replace(line, style=f"{style} {QUIET}", sign="")
        held_out, marks = METRICS[metric].held_out, list[XY]()
        if held_out:
            marks = _means(curve.series(held_out).visible(*steps, count))
        flat = curve.flat() if metric == "loss" else None
        later = [column for column in columns if flat and flat[1] <= column.x]
        is_seen = len(later) < len(columns)
        return replace(
            line,
            label=curve.label,
            value=self._value(curve, metric) or "–",
            band=[column[:3] for column in columns if line.bold],
            band_style=f"{style} {BAND}",
            marks=marks,
            flat=_means(later)[0] if later and is_seen else None,
        )

    def _value(self, curve: Curve, metric: str) -> str:
        """The value at the cursor, or the newest; "" if there is none."""
        value = curve.value(metric, self.window.cursor)
        return "" if value is None else METRICS[metric].format(value)

    def _small_metrics(self) -> list[str]:
        """Those that change, but for the large one."""
        names = (name for name in METRICS if name != self.metric)
        return [name for name in names if not self.runs.is_constant(name)]

    def _head(self, metric: str) -> Head:
        """A metric's name, and its value of the pointed run, else of the uppermost that has one."""
        short = METRICS[metric].short
        for curve in reversed(self.curves):
            value = "" if self.is_quiet(curve) else self._value(curve, metric)
            if value:
                return Head(short, value, look_style(curve.view.look))
        return Head(short)

    def _facts(self) -> Iterable[str]:
        """What is drawn, and how; the least important comes last."""
        window, (first, last) = self.window, self.steps
        if window.cursor is not None:
            yield f"at step {window.cursor:,.0f}"
        if window.x is None:
            yield "all steps"
        elif window.following:
            yield f"last {last - first:,.0f} steps"
        else:
            yield f"steps {first:,.0f} to {last:,.0f}"
        yield "log" if self.chart.drawing.y.log else "linear"
        if any(isinstance(line, Line) and line.marks for line in self.chart.shown):
            yield "× held out"
        yield f"smooth {self.runs.smoothing:g}"

    def panels(self) -> list[dict[str, Any]]:
        """The plots that are visible, at a higher resolution, as `pipeline.stages.charts` takes
        them.
        """
        y = self.chart.drawing.y
        ends = (power_of_ten(y.low), power_of_ten(y.high)) if y.log else (y.low, y.high)
        panels = [self._panel(name) for name in (self.metric, *self._small_metrics())]
        return [{**panels[0], "y": ends, "log": y.log}, *panels[1:]]

    def _panel(self, metric: str) -> dict[str, Any]:
        curves = []
        for curve in self.curves:
            columns = curve.series(metric).visible(*self.steps, POINTS)
            more = {"columns": columns, "color": curve.view.look.color}
            curves.append({**vars(self._line(curve, metric, POINTS)), **more})
        title = METRICS[metric].title
        return {"title": title, "x": self.steps, "y": None, "log": False, "curves": curves}

    # What keys and the mouse do

    def set_window(self, **change: Any) -> None:
        self.window = replace(self.window, **change)
        self.post_message(self.Changed())

    def offers(self, what: str) -> bool:
        """Whether a key does something now."""
        if what == "leave":
            return self.window.cursor is not None or self.metric != "loss"
        is_moved = (self.window.x, self.window.y) != (None, None)
        return is_moved or what not in ("reset", "follow")

    def leave(self) -> None:
        """End the step cursor, then bring the loss back."""
        if self.window.cursor is None:
            self.enlarge("loss")
        else:
            self.set_window(cursor=None)

    def enlarge(self, metric: str) -> None:
        self.metric = metric
        self.set_window(y=None, log=None)

    def choose(self, by: int) -> None:
        """Go to the next small plot."""
        go = self.screen.focus_next if by > 0 else self.screen.focus_previous
        go("#small Plot")

    def toggle_log(self) -> None:
        self.set_window(log=not self.chart.drawing.y.log, y=None)

    def follow(self) -> None:
        self.set_window(following=True, y=None)

    def reset(self) -> None:
        self.set_window(x=None, y=None, following=False)

    def sideways(self, direction: int) -> None:
        """Move the step cursor by a column; at first it is at the last step of the pointed run."""
        (first, last), cursor = self.steps, self.window.cursor
        if cursor is None:
            steps = self.curves[-1].log.steps if self.curves else ()
            cursor = steps[-1] if steps else last
        else:
            column = (last - first) / max(self.chart.drawing.width, 1)
            cursor += direction * max(round(column), 1)
        self.set_window(cursor=min(max(round(cursor), round(first)), round(last)))

    def step(self, end: int) -> None:
        """The step cursor to the first or the last step."""
        self.set_window(cursor=round(self.steps[end]))

    def smooth(self, direction: int) -> None:
        """Smooth more or less."""
        index = SMOOTHINGS.index(self.runs.smoothing) + direction
        # now: the next key may come before the lines are smoothed
        self.runs.smoothing = SMOOTHINGS[min(max(index, 0), len(SMOOTHINGS) - 1)]
        self._smooth()

    @work(exclusive=True)
    async def _smooth(self) -> None:
        await self.runs.smooth()
        self.post_message(self.Changed())

    def zoom(self, x: float, y: float = 1.0) -> None:
        self.chart.zoom(x, y, self.window.cursor)

    @on(Plot.Moved)
    def _moved(self, event: Plot.Moved) -> None:
        """Stay at the new ranges."""
        shown = self.chart.drawing.y
        y = self.window.y if event.y == (shown.low, shown.high) else event.y
        self.set_window(x=event.x, y=y, following=False)

    @on(Plot.Clicked, "#chart Plot")
    def _clicked(self, event: Plot.Clicked) -> None:
        self.set_window(cursor=round(event.x))

    @on(Plot.Opened)
    def _opened(self, event: Plot.Opened) -> None:
        self.enlarge(event.control.name or "loss")


def _means(columns: Sequence[Column]) -> list[XY]:
    return [(column.x, column.mean) for column in columns]
