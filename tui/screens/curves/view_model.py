"""What the curves screen shows of runs: their curves in a panel, values at a step, entries in a legend and a list."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from rich.text import Text

from pipeline.project.palette import Look
from pipeline.project.params.grid import DIVERGED
from tui.screens.curves.curve_log import CurveLog
from tui.screens.curves.run_list import Row
from tui.screens.curves.run_view import RunView
from tui.screens.curves.series import HELD_OUT, QUANTITIES, Log
from tui.widgets.plot.curve import Curve, Range, power_of_ten

TITLES = {
    "loss": "loss (nats a token)",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "divergence": "divergence from the base (nats a token)",
}
POINTED = Look("#FFFFFF", "☆")  # of the sweep's adapter that is pointed at; black on a light background
LONGEST = 44  # characters of an adapter's name in the list
Drawn = Iterable[tuple[str, RunView]]


@dataclass(frozen=True)
class Window:
    """What is looked at. `x` None: all steps; `y` None: all values. Following: `x` moves on with the newest step."""

    x: Range | None = None
    y: Range | None = None
    log: bool = False
    following: bool = True
    cursor: float | None = None

    def steps(self, drawn: Drawn) -> Range:
        """The steps shown: all, those of the window, or as many as in the window up to the newest."""
        steps = [log.steps for _, watched in drawn for log in watched.logs if log.steps]
        first, last = (min(s[0] for s in steps), max(s[-1] for s in steps)) if steps else (0.0, 1.0)
        if self.x is None:
            return (first, last) if first < last else (first - 1, last + 1)
        return (last - (self.x[1] - self.x[0]), last) if self.following else self.x


@dataclass(frozen=True)
class Line:
    """One curve to draw: whose it is, how it looks, and how much of it is drawn."""

    watched: RunView
    trace: CurveLog
    look: Look
    dim: bool = False

    def curve(self, name: str, x: Range, columns: int) -> Curve:
        """One quantity between two steps; evaluations and the place where it is flat belong to the loss."""
        log = self.trace.log
        points = log.series[name].visible(*x, columns)
        stray = self.trace.end == DIVERGED
        if name != "loss" or self.dim:
            return Curve(points, self.look.color, self.look.sign, dim=self.dim, stray=stray)
        flat = log.flat(self.watched.alive and not self.trace.end)
        held_out = log.series[HELD_OUT].visible(*x, columns)
        return Curve(points, self.look.color, self.look.sign, flat[1] if flat else None, held_out, stray=stray)

    @property
    def label(self) -> str:
        """For a legend; the dim ones of a sweep have none of their own."""
        if self.dim:
            return ""
        flat = self.trace.log.flat(self.watched.alive)
        return self.watched.run.curve_label(self.trace.name) + (f", | flat from epoch {flat[0]:.0f}" if flat else "")


def lines(drawn: Drawn, looks: Mapping[str, Look], pointed: str = "") -> list[Line]:
    """A line for each curve, those of a sweep dimmer but for its best and the one `pointed` at, which are on top."""
    found = [
        Line(watched, trace, looks[key], dim=trace is not watched.best)
        for key, watched in drawn
        for trace in watched.traces.values()
    ]
    found = [
        Line(line.watched, line.trace, POINTED) if pointed and adapter(line.watched, line.trace) == pointed else line
        for line in found
    ]
    return sorted(found, key=lambda line: (not line.dim, line.look == POINTED))


def adapter(watched: RunView, trace: CurveLog) -> str:
    """What tells an adapter of a sweep from every other; empty for another run's only curve."""
    return str(watched.run.log_folder / trace.name) if trace.name else ""


def values(y: Range | None, log: bool) -> Range | None:
    """A range as values where it was in powers of ten."""
    return (power_of_ten(y[0]), power_of_ten(y[1])) if y and log else y


def has(drawn: Drawn, name: str) -> bool:
    """Whether a run that is shown has any of it: divergence is measured only where it is asked for."""
    return name != QUANTITIES[-1] or any(log.series[name].y for _, watched in drawn for log in watched.logs)


def reading(log: Log, step: float) -> str:
    """What a curve has at the step nearest to `step`; nothing where it has not been."""
    at = log.at(step)
    if at is None or not log.steps[0] <= step <= log.steps[-1]:
        return "–"
    loss = log.series["loss"]
    text = f"{loss.y[at]:.4g} (smoothed {loss.smooth[at]:.4g})"
    for name, words in ((HELD_OUT, "held out"), ("divergence", "divergence")):
        value = log.series[name].until(step)
        text += "" if value is None else f", {words} {value:.4g}"
    return text


def mode(window: Window, smoothing: float, shown: list[Line]) -> Text:
    """One line: following or frozen, the scale, the smoothing; with the cursor, what each run has there."""
    parts = ["following" if window.following else "frozen: f follows again"]
    parts += ["log" if window.log else "linear", f"smoothing {smoothing:g}"]
    if window.log and any(min(line.trace.log.series["loss"].y, default=1) <= 0 for line in shown):
        parts.append("values of 0 or less have no place on a log axis")
    text = Text(" · ".join(parts))
    if window.cursor is not None:
        text.append(f"\nstep {window.cursor:,.0f}:", "bold")
        for line in shown:
            if not line.dim:
                name = f"{line.trace.name} " if line.trace.name else ""
                text.append(f"  {line.look.sign} {name}{reading(line.trace.log, window.cursor)}")
    return text


def rows(
    watched: Mapping[str, RunView], looks: Mapping[str, Look], on: Collection[str], opened: Collection[str]
) -> Iterator[Row]:
    """A row for each run, and below a sweep that is opened one for each of its adapters."""
    for key, one in watched.items():
        facts, look = one.facts() if key in on else [one.state], looks[key]
        if not one.run.sweeps:
            yield Row(key, key in on, look.sign, look.color, one.run.label, facts)
            continue
        yield Row(key, key in on, look.sign, look.color, one.run.label, facts, open=key in opened)
        if key in opened:
            yield from _adapters(key, one, look, key in on)


def _adapters(key: str, watched: RunView, look: Look, on: bool) -> Iterator[Row]:
    """Names in a column of their own."""
    width = min(max(map(len, watched.traces)), LONGEST)
    for name, trace in watched.traces.items():
        short = name if len(name) <= width else f"{name[: width - 1]}…"
        sign = look.sign if trace is watched.best else " "
        yield Row(adapter(watched, trace), on, sign, look.color, f"{short:{width}}", watched.facts_of(trace), of=key)
