"""What the curves screen shows of a run: its curve in a panel, its values at a step, its entry in a legend."""

from pipeline.looks import Look
from tui.series import HELD_OUT
from tui.watch import Watched
from tui.widgets.curve import Curve, Range, power_of_ten

TITLES = {
    "loss": "loss (nats a token)",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "divergence": "divergence from the base (nats a token)",
}


def curve(watched: Watched, look: Look, name: str, x: Range, columns: int) -> Curve:
    """One quantity of a run between two steps; evaluations and the place where it is flat belong to the loss."""
    series = watched.log.series
    points = series[name].visible(*x, columns)
    if name != "loss":
        return Curve(points, look.color, look.sign)
    flat = watched.log.flat(watched.alive)
    return Curve(points, look.color, look.sign, flat[1] if flat else None, series[HELD_OUT].visible(*x, columns))


def values(y: Range | None, log: bool) -> Range | None:
    """A range as values where it was in powers of ten."""
    return (power_of_ten(y[0]), power_of_ten(y[1])) if y and log else y


def legend(watched: Watched) -> str:
    flat = watched.log.flat(watched.alive)
    return watched.run.label + (f", | flat from epoch {flat[0]:.0f}" if flat else "")


def reading(watched: Watched, step: float) -> str:
    """What a run has at the step nearest to `step`; nothing where it has not been."""
    at = watched.log.at(step)
    if at is None or not watched.log.steps[0] <= step <= watched.log.steps[-1]:
        return "–"
    loss = watched.log.series["loss"]
    text = f"{loss.y[at]:.4g} (smoothed {loss.smooth[at]:.4g})"
    for name, words in ((HELD_OUT, "held out"), ("divergence", "divergence")):
        value = watched.log.series[name].until(step)
        text += "" if value is None else f", {words} {value:.4g}"
    return text
