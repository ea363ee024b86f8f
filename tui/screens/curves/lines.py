"""The lines of the curves that are on, as a plot or an export draws them, and the window on them."""

from dataclasses import dataclass, replace

from pipeline.project.logs.run_log import DIVERGED
from pipeline.views.curves import Curve, Runs, RunView
from pipeline.views.series import METRICS, Column
from tui.panes.plot.scale import Range
from tui.panes.plot.series import Line
from tui.widgets.colors import look_style

QUIET, BAND = "50%", "30%"  # of the colour, the rest is background


@dataclass(frozen=True)
class Drawn:
    """A curve that is drawn. `pointed`: the list's cursor is on it. `quiet`: another adapter of a
    sweep than its best.
    """

    curve: Curve
    quiet: bool = False
    pointed: bool = False

    @property
    def style(self) -> str:
        return look_style(self.curve.view.look)

    def columns(self, metric: str, x: Range, count: int) -> list[Column]:
        return self.curve.series(metric).visible(*x, count)

    def line(
        self, metric: str, x: Range, count: int, cursor: float | None = None, labels: bool = True
    ) -> Line:
        """Its line in a plot of `count` columns. With `labels`, the pointed one has the band of its
        raw values.
        """
        curve, columns = self.curve, self.columns(metric, x, count)
        line = Line(
            [(column.x, column.mean) for column in columns],
            self.style,
            sign=curve.view.look.sign,
            bold=self.pointed,
            stray=curve.outcome == DIVERGED,
        )
        if self.quiet:
            return replace(line, style=f"{self.style} {QUIET}", sign="")
        if held_out := METRICS[metric].held_out:
            marks = [(column.x, column.mean) for column in self.columns(held_out, x, count)]
            line = replace(line, marks=marks)
        if metric == "loss":
            line = replace(line, flat=self._flat(columns))
        if not labels:
            return line
        if self.pointed:
            band = [column[:3] for column in columns]
            line = replace(line, band=band, band_style=f"{self.style} {BAND}")
        return replace(line, label=curve.label, value=format_value(curve, metric, cursor))

    def _flat(self, columns: list[Column]) -> tuple[float, float] | None:
        """The first column from which the loss is flat, if it is seen."""
        flat = self.curve.flat()
        if not flat or not columns or flat[1] < columns[0].x:
            return None
        return next(((c.x, c.mean) for c in columns if c.x >= flat[1]), None)


def drawn(runs: Runs, pointed: RunView | Curve | None) -> list[Drawn]:
    """All curves that are on, in drawing order: the quiet ones, the others, those that run, the
    pointed one.
    """
    lines, top = [], best_of(pointed)
    for curve in runs.curves:
        is_best, is_top = curve is curve.view.best, curve is top
        lines.append(Drawn(curve, quiet=not (is_best or is_top), pointed=is_top))
    return sorted(lines, key=lambda line: (line.pointed, not line.quiet, line.curve.view.alive))


def best_of(row: RunView | Curve | None) -> Curve | None:
    """A curve itself, of a run its best."""
    return row.best if isinstance(row, RunView) else row


def format_value(curve: Curve, metric: str, step: float | None) -> str:
    value = curve.value(metric, step)
    return "–" if value is None else METRICS[metric].format(value)


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

    def steps(self, runs: Runs) -> Range:
        """The visible steps: all, the window's, or as many up to the newest step."""
        steps = [curve.log.steps for curve in runs.curves if curve.log.steps]
        first = min((each[0] for each in steps), default=0.0)
        last = max((each[-1] for each in steps), default=1.0)
        if self.x is None:
            return (first, last) if first < last else (first - 1, last + 1)
        return (last - (self.x[1] - self.x[0]), last) if self.following else self.x

    def facts(self, steps: Range) -> list[str]:
        """Cursor and steps in words."""
        first, last = steps
        text = f"steps {first:,.0f} to {last:,.0f}"
        if self.x is None:
            text = "all steps"
        elif self.following:
            text = f"last {last - first:,.0f} steps"
        return [text] if self.cursor is None else [f"at step {self.cursor:,.0f}", text]
