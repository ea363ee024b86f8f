"""What a run logs over its steps: names, units, and how a value is written."""

from collections.abc import Callable
from dataclasses import dataclass

from pipeline.files.text import in_units
from tui.widgets.plot.scale import number


def _short(value: float) -> str:
    """Three digits that count: 0.0158, 6,810."""
    return number(float(f"{value:.3g}"))


@dataclass(frozen=True)
class Metric:
    """A series of the log by its column; `held_out` is the column of the same on held-out
    examples.
    """

    title: str
    short: str
    held_out: str = ""
    smoothed: bool = True  # without noise, smoothing would only delay a value
    format: Callable[[float], str] = _short


METRICS = {
    "loss": Metric("Loss, nats/token", "loss", "eval_loss"),
    "eval_answers": Metric(
        "Held-out answers as expected (long ones: ROUGE-L)",
        "answers",
        smoothed=False,
        format=lambda share: f"{share:.0%}",
    ),
    "divergence": Metric("Divergence from the base, nats/token", "divergence"),
    "reward_margin": Metric("Reward margin, chosen − rejected", "margin"),
    "reward_accuracy": Metric(
        "Pairs whose chosen answer has the higher reward", "accuracy", "eval_accuracy"
    ),
    "grad_norm": Metric("Gradient norm", "grad norm"),
    "learning_rate": Metric("Learning rate", "learning rate", smoothed=False),
    "tokens_per_second": Metric("Labelled tokens a second", "tokens/s"),
    "memory": Metric(
        "Memory of tensors at the peak of a step",
        "memory",
        smoothed=False,
        format=lambda v: in_units(int(v)),
    ),
}
HELD_OUT = {name: metric.held_out for name, metric in METRICS.items() if metric.held_out}
COST = ("tokens_per_second", "memory")  # of the telemetry, which an artifact does not keep


def smoothing_of(name: str, smoothing: float) -> float:
    """How much a column is smoothed; measurements on held-out examples are few, and are not."""
    return smoothing if name in METRICS and METRICS[name].smoothed else 0.0
