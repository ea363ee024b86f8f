"""A sweep: the columns of its table, and a plot of its losses by each key that it varied."""

from collections.abc import Callable, Iterator
from typing import Any

from textual.content import Content

from pipeline.evaluation.comparison import MISSING
from pipeline.files.text import natural_sort_key
from pipeline.views.sweeps import Sweep, Trial, value_text
from tui.panes.plot.series import Axis, Point
from tui.panes.table import Column
from tui.widgets.colors import look_style, method_look

FRONT, BEST = "◆", "◂"
MAX_NAME = 28  # cells
DIVERGENCE = "divergence"


def columns(sweep: Sweep) -> Iterator[Column[Trial]]:
    """The values of each adapter, its loss, its divergence from the base."""
    yield Column("adapter", _name, lambda trial: natural_sort_key(trial.name))
    yield _number("loss", lambda trial: trial.loss)
    if sweep.diverges:
        yield _number(DIVERGENCE, lambda trial: trial.divergence)
    for key in sweep.keys:
        yield _key_column(key)
    if any(trial.kept is not None for trial in sweep.trials):
        yield Column("kept", _kept, lambda trial: trial.kept, largest_first=True, right=True)
    yield Column("trained", lambda t: f"{t.trainable:,}", lambda t: t.trainable, right=True)
    yield Column("state", _state, lambda trial: trial.state)


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


def _kept(trial: Trial) -> str:
    return MISSING if trial.kept is None else f"{trial.kept:.0%}"


def _number(title: str, value: Callable[[Trial], float | None]) -> Column[Trial]:
    def cell(trial: Trial) -> str:
        number = value(trial)
        return MISSING if number is None else f"{number:.4f}"

    return Column(title, cell, value, right=True)


def facts(sweep: Sweep) -> list[str]:
    """What the title says."""
    edge = [f"best at the edge: {', '.join(sweep.edges)}"] if sweep.edges else []
    loss = "held-out loss" if sweep.held_out else "training loss: no data is held out"
    return [*edge, f"{len(sweep.trials)} adapters", loss]


def plots(sweep: Sweep) -> list[str]:
    """What the losses are drawn against: the divergence, and each key that was swept."""
    return [*[DIVERGENCE] * sweep.diverges, *sweep.keys]


def plot(sweep: Sweep, key: str, pointed: str) -> tuple[list[Point], Axis, Axis]:
    """The points of a plot and its axes; better is to the right and upwards."""
    trials = [trial for trial in sweep.trials if trial.loss is not None]
    trials.sort(key=lambda trial: (trial.name != pointed, not trial.best, not trial.front))
    y = Axis("loss, less is better", log=None, falls=True)
    values = [trial.values.get(key) for trial in trials]
    if key == DIVERGENCE:
        values = [trial.divergence for trial in trials]
    known = [
        (trial, value) for trial, value in zip(trials, values, strict=True) if value is not None
    ]
    if key == DIVERGENCE:
        x = Axis("divergence from the base", log=None, falls=True)
    elif all(_is_number(value) for _, value in known):
        tried = sorted({float(value) for _, value in known})
        x = Axis(key, log=None, marks=[(value, value_text(value)) for value in tried])
    else:
        names = sorted({value_text(value) for _, value in known})
        known = [(trial, names.index(value_text(value))) for trial, value in known]
        x = Axis(key, (-0.5, len(names) - 0.5), marks=list(enumerate(names)))
    return [_point(trial, float(value), pointed) for trial, value in known], x, y


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _point(trial: Trial, x: float, pointed: str) -> Point:
    look, is_pointed = method_look("sweep"), trial.name == pointed
    sign, style = "●", look_style(look)
    if trial.front:
        sign = FRONT
    elif trial.best:
        sign = look.sign
    if trial.best:
        style = f"bold {style}"
    elif not (is_pointed or trial.front):
        style = f"{style} dim"
    label = trial.name if is_pointed else ""
    return Point(x, trial.loss or 0.0, sign, label, style, is_pointed)
