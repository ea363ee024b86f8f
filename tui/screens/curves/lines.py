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

    def value(self, metric: str, step: float | None) -> str:
        """The value at a step, or the newest; "" if there is none."""
        value = self.curve.value(metric, step)
        return "" if value is None else METRICS[metric].format(value)

    def line(self, metric: str, x: Range, count: int, cursor: float | None = None) -> Line:
        """Its line in a plot of `count` columns; the pointed one has the band of its raw values."""
        curve, columns = self.curve, self.columns(metric, x, count)
        line = Line(
            _means(columns),
            self.style,
            sign=curve.view.look.sign,
            bold=self.pointed,
            stray=curve.outcome == DIVERGED,
        )
        if self.quiet:
            return replace(line, style=f"{self.style} {QUIET}", sign="")
        held_out = METRICS[metric].held_out
        flat = curve.flat() if metric == "loss" else None
        later = [column for column in columns if flat and flat[1] <= column.x]
        is_seen = len(later) < len(columns)
        return replace(
            line,
            label=curve.label,
            value=self.value(metric, cursor) or "–",
            band=[column[:3] for column in columns if self.pointed],
            band_style=f"{self.style} {BAND}",
            marks=_means(self.columns(held_out, x, count)) if held_out else (),
            flat=_means(later)[0] if later and is_seen else None,
        )


def _means(columns: list[Column]) -> list[tuple[float, float]]:
    return [(column.x, column.mean) for column in columns]


def drawn(runs: Runs, pointed: Curve | None) -> list[Drawn]:
    """All curves that are on, in drawing order: the quiet ones, the others, those that run, the
    pointed one.
    """
    lines = []
    for curve in runs.curves:
        is_loud = curve in (curve.view.best, pointed)
        lines.append(Drawn(curve, not is_loud, curve is pointed))
    return sorted(lines, key=lambda line: (line.pointed, not line.quiet, line.curve.view.alive))


def best_of(row: RunView | Curve | None) -> Curve | None:
    """A curve itself, of a run its best."""
    return row.best if isinstance(row, RunView) else row


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
        logs = [curve.log.steps for curve in runs.curves]
        ends = [end for steps in logs for end in (*steps[:1], *steps[-1:])]
        first, last = min(ends, default=0.0), max(ends, default=1.0)
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
