"""What the curves screen shows of runs: curves, values at the cursor, legend and list."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from rich.text import Text

from pipeline.project.logs.outcomes import DIVERGED
from pipeline.project.palette import Look
from tui.screens.curves.curve_log import CurveLog
from tui.screens.curves.run_list import Row
from tui.screens.curves.run_view import RunView
from tui.screens.curves.series import HELD_OUT, QUANTITIES, Log
from tui.widgets.plot.curve import Curve, Range, power_of_ten

TITLES = {
    "loss": "loss (nats per token)",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "divergence": "divergence from the base (nats per token)",
}
POINTED = Look("#FFFFFF", "☆")  # look of the highlighted adapter; drawn black on a light background
MAX_NAME = 44  # characters of an adapter's name in the list, at most
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
    lines = [
        Line(view, curve_log, looks[key], dim=curve_log is not view.best)
        for key, view in visible
        for curve_log in view.curve_logs.values()
    ]
    lines = [
        Line(line.view, line.curve_log, POINTED)
        if pointed and adapter_key(line.view, line.curve_log) == pointed
        else line
        for line in lines
    ]
    return sorted(lines, key=lambda line: (not line.dim, line.look == POINTED))


def adapter_key(view: RunView, curve_log: CurveLog) -> str:
    """A unique key for an adapter of a sweep; empty for a run that is not a sweep."""
    return str(view.run.log_folder / curve_log.name) if curve_log.name else ""


def from_log10(y: Range | None, log: bool) -> Range | None:
    """A range in values; with `log`, `y` holds exponents of ten."""
    return (power_of_ten(y[0]), power_of_ten(y[1])) if y and log else y


def has_values(visible: Visible, name: str) -> bool:
    """Whether any visible run has values of a metric. Only divergence is optional."""
    return name != QUANTITIES[-1] or any(log.series[name].y for _, view in visible for log in view.logs)


def format_reading(log: Log, step: float) -> str:
    """A curve's values at the step nearest to `step`; – outside its steps."""
    index = log.index_at(step)
    if index is None or not log.steps[0] <= step <= log.steps[-1]:
        return "–"
    loss = log.series["loss"]
    text = f"{loss.y[index]:.4g} (smoothed {loss.smooth[index]:.4g})"
    for name, label in ((HELD_OUT, "held out"), ("divergence", "divergence")):
        value = log.series[name].value_at(step)
        text += "" if value is None else f", {label} {value:.4g}"
    return text


def status_line(window: Window, smoothing: float, shown: list[Line]) -> Text:
    """Following or frozen, scale, smoothing; with a cursor, a second line with the values of each run."""
    parts = ["following" if window.following else "frozen: f follows again"]
    parts += ["log" if window.log else "linear", f"smoothing {smoothing:g}"]
    if window.log and any(min(line.curve_log.log.series["loss"].y, default=1) <= 0 for line in shown):
        parts.append("values of 0 or less are not shown on a log axis")
    text = Text(" · ".join(parts))
    if window.cursor is not None:
        text.append(f"\nstep {window.cursor:,.0f}:", "bold")
        for line in shown:
            if not line.dim:
                name = f"{line.curve_log.name} " if line.curve_log.name else ""
                text.append(f"  {line.look.sign} {name}{format_reading(line.curve_log.log, window.cursor)}")
    return text


def list_rows(
    views: Mapping[str, RunView], looks: Mapping[str, Look], shown_keys: Collection[str], expanded: Collection[str]
) -> Iterator[Row]:
    """A row per run, and below an expanded sweep a row per adapter."""
    for key, view in views.items():
        facts, look = view.facts() if key in shown_keys else [view.state], looks[key]
        if not view.run.sweeps:
            yield Row(key, key in shown_keys, look.sign, look.color, view.run.label, facts)
            continue
        yield Row(key, key in shown_keys, look.sign, look.color, view.run.label, facts, expanded=key in expanded)
        if key in expanded:
            yield from _adapter_rows(key, view, look, key in shown_keys)


def _adapter_rows(key: str, view: RunView, look: Look, on: bool) -> Iterator[Row]:
    """The rows of a sweep's adapters, their names padded to one width."""
    width = min(max(map(len, view.curve_logs)), MAX_NAME)
    for name, curve_log in view.curve_logs.items():
        label = name if len(name) <= width else f"{name[: width - 1]}…"
        sign = look.sign if curve_log is view.best else " "
        yield Row(
            adapter_key(view, curve_log),
            on,
            sign,
            look.color,
            f"{label:{width}}",
            view.facts_of(curve_log),
            sweep=key,
        )
