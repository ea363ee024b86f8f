"""What the curves screen shows of runs: the visible range, a line per curve, values at the cursor."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rich.text import Text

from pipeline.project.logs.outcomes import DIVERGED
from pipeline.project.palette import Look
from tui.screens.curves.runs import CurveLog, RunView
from tui.screens.curves.series import HELD_OUT, QUANTITIES
from tui.widgets.line_chart import Curve, Range

TITLES = {
    "loss": "loss (nats per token)",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "divergence": "divergence from the base (nats per token)",
}
POINTED = Look("#FFFFFF", "☆")  # look of the highlighted adapter; drawn black on a light background
Visible = Iterable[tuple[str, RunView]]


@dataclass(frozen=True)
class Window:
    """The visible ranges. `x` None: all steps; `y` None: all values. `following`: `x` moves with the newest step."""

    x: Range | None = None
    y: Range | None = None
    log: bool = False
    following: bool = True
    cursor: float | None = None

    def steps(self, visible: Visible) -> Range:
        """The visible steps: all, the range `x`, or a range as wide as `x` up to the newest step."""
        steps = [log.steps for _, view in visible for log in view.logs if log.steps]
        first, last = (min(s[0] for s in steps), max(s[-1] for s in steps)) if steps else (0.0, 1.0)
        if self.x is None:
            return (first, last) if first < last else (first - 1, last + 1)
        return (last - (self.x[1] - self.x[0]), last) if self.following else self.x


@dataclass(frozen=True)
class Line:
    """A curve to draw. If `dim`, it is drawn as a line only."""

    view: RunView
    curve_log: CurveLog
    look: Look
    dim: bool = False

    def curve(self, name: str, x: Range, columns: int) -> Curve:
        """The metric `name` in the range of steps `x`. Only the loss has evaluations and a flat mark."""
        log = self.curve_log.log
        points = log.series[name].visible(*x, columns)
        stray = self.curve_log.outcome == DIVERGED
        if name != "loss" or self.dim:
            return Curve(points, self.look.color, self.look.sign, dim=self.dim, stray=stray)
        flat = log.flat(self.view.alive and not self.curve_log.outcome)
        held_out = log.series[HELD_OUT].visible(*x, columns)
        return Curve(points, self.look.color, self.look.sign, flat[1] if flat else None, held_out, stray=stray)

    @property
    def label(self) -> str:
        """The label in a legend; empty for the dim curves of a sweep."""
        if self.dim:
            return ""
        flat = self.curve_log.log.flat(self.view.alive)
        return self.view.run.curve_label(self.curve_log.name) + (f", | flat from epoch {flat[0]:.0f}" if flat else "")


def chart_lines(visible: Visible, looks: Mapping[str, Look], pointed: str = "") -> list[Line]:
    """A line per curve. A sweep's are dim, except for the best and the `pointed` (highlighted) one, drawn last."""
    lines = []
    for key, view in visible:
        for curve_log in view.curve_logs.values():
            if pointed and view.adapter_key(curve_log) == pointed:
                lines.append(Line(view, curve_log, POINTED))
            else:
                lines.append(Line(view, curve_log, looks[key], dim=curve_log is not view.best))
    return sorted(lines, key=lambda line: (not line.dim, line.look == POINTED))


def has_values(visible: Visible, name: str) -> bool:
    """Whether any visible run has values of a metric. Only divergence is optional."""
    return name != QUANTITIES[-1] or any(log.series[name].y for _, view in visible for log in view.logs)


def status_line(window: Window, smoothing: float, shown: list[Line]) -> Text:
    """Following or frozen, scale, smoothing; with a cursor, a second line with the values of each run."""
    parts = ["following" if window.following else "frozen: f follows again"]
    parts += ["log" if window.log else "linear", f"smoothing {smoothing:g}"]
    if window.log and any(min(line.curve_log.log.series["loss"].y, default=1) <= 0 for line in shown):
        parts.append("values of 0 or less are not shown on a log axis")
    text = Text(" · ".join(parts))
    if window.cursor is None:
        return text
    text.append(f"\nstep {window.cursor:,.0f}:", "bold")
    for line in shown:
        if line.dim:
            continue
        text.append(f"  {line.look.sign} {f'{line.curve_log.name} ' if line.curve_log.name else ''}")
        log = line.curve_log.log
        index = log.index_at(window.cursor)
        if index is None or not log.steps[0] <= window.cursor <= log.steps[-1]:
            text.append("–")
            continue
        loss = log.series["loss"]
        text.append(f"{loss.y[index]:.4g} (smoothed {loss.smooth[index]:.4g})")
        for name, label in ((HELD_OUT, "held out"), ("divergence", "divergence")):
            if (value := log.series[name].value_at(window.cursor)) is not None:
                text.append(f", {label} {value:.4g}")
    return text
