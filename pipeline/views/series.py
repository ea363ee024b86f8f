"""What a run logs over its steps, in plain arrays: smoothed as it arrives, and reduced to the columns
of a chart.
"""

from array import array
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf, isfinite
from typing import NamedTuple

from pipeline.files.text import in_units
from pipeline.project.logs.run_log import COLUMNS, OPTIONAL, Row, Telemetry, flat_epoch

EARLY = 8  # the average reaches back over an eighth of the steps so far, at most
# points whose minimum, maximum and sum are cached, so that wide columns need not read every point
BLOCK = 32
# rows of telemetry from which the pace is estimated; steps between them, at least
RECENT, MIN_STEPS = 200, 5


def three_digits(value: float) -> str:
    """0.0158, 6,810."""
    return f"{float(f'{value:.3g}'):,.6g}"


@dataclass(frozen=True)
class Metric:
    """A series of the log by its column; `held_out` is the column of the same on held-out
    examples.
    """

    title: str
    short: str
    held_out: str = ""
    smoothed: bool = True  # without noise, smoothing would only delay a value
    format: Callable[[float], str] = three_digits


METRICS = {
    "loss": Metric("Loss, nats/token", "loss", "eval_loss"),
    "eval_answers": Metric(
        "Held-out answers as expected (long ones: ROUGE-L)",
        "answers",
        smoothed=False,
        format="{:.0%}".format,
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
        format=lambda size: in_units(int(size)),
    ),
}
HELD_OUT = {name: metric.held_out for name, metric in METRICS.items() if metric.held_out}
COST = ("tokens_per_second", "memory")  # of the telemetry, which an artifact does not keep


def smoothing_of(name: str, smoothing: float) -> float:
    """How much a column is smoothed; measurements on held-out examples are few, and are not."""
    return smoothing if name in METRICS and METRICS[name].smoothed else 0.0


class Column(NamedTuple):
    """The steps in one column of a plot: x, minimum and maximum of the raw values, mean of the
    smoothed ones.
    """

    x: float
    low: float
    high: float
    mean: float


class Series:
    """A metric over the steps. `smooth` is its exponential moving average, with less memory at the
    begin of a run.

    There the average, bias-corrected as in Adam, would be little else than the mean of all steps:
    after 13 steps in which a loss falls from 2 to 0.1, 0.5 at a strength of 0.9. So of n values the
    last weighs 8/(n + 7) or more (polynomial-decay averaging, Shamir & Zhang 2013), which is all of
    it at n = 1.
    """

    def __init__(self, x: "array[float]", strength: float) -> None:
        self.x, self.y = x, array("d")
        self._finite = True
        self.smooth_again(strength)

    def smooth_again(self, strength: float) -> None:
        """Smooth all values with another strength."""
        self.strength, self.smooth = strength, array("d")
        self._mean, self._count = 0.0, 0  # of the finite values
        # one value per block
        self._lows, self._highs, self._sums = array("d"), array("d"), array("d")
        self.extend(())

    def extend(self, values: Iterable[float]) -> None:
        """Append raw values and their smoothed ones. A value that is not finite does not change the
        average.
        """
        least, mean, count = 1 - self.strength, self._mean, self._count
        self.y.extend(values)
        smoothed = []
        for value in self.y[len(self.smooth) :]:
            if isfinite(value):
                count += 1
                weight = max(least, EARLY / (count + EARLY - 1))
                mean = (1 - weight) * mean + weight * value
            else:
                self._finite = False
            smoothed.append(mean if count else value)
        self.smooth.extend(smoothed)
        self._mean, self._count = mean, count
        for start in range(len(self._sums) * BLOCK, len(self.y) - BLOCK + 1, BLOCK):
            self._lows.append(min(self.y[start : start + BLOCK]))
            self._highs.append(max(self.y[start : start + BLOCK]))
            self._sums.append(sum(self.smooth[start : start + BLOCK]))

    @property
    def constant(self) -> bool:
        """Whether all finite values are equal, or there is none."""
        whole = self.visible(self.x[0], self.x[-1], 1) if self.x else []
        return all(column.low >= column.high for column in whole)

    def visible(self, first: float, last: float, columns: int) -> list[Column]:
        """Decimate steps `first` to `last` to at most `columns` columns of equal width, leaving out
        empty ones.

        Every finite point in the range is between `low` and `high` of its column.
        """
        width = (last - first) / columns
        edges = [bisect_left(self.x, first + width * i) for i in range(columns)]
        edges.append(bisect_right(self.x, last))
        visible = []
        for start, end in pairwise(edges):
            if start == end:
                continue
            x = (self.x[start] + self.x[end - 1]) / 2
            if self._finite:
                low = min(self._with_blocks(self.y, self._lows, start, end))
                high = max(self._with_blocks(self.y, self._highs, start, end))
                total = sum(self._with_blocks(self.smooth, self._sums, start, end))
                visible.append(Column(x, low, high, total / (end - start)))
                continue
            # One NaN makes the cached values of its block useless, so every point is read.
            raw, smooth = (
                [v for v in values[start:end] if isfinite(v)] for values in (self.y, self.smooth)
            )
            if raw:
                visible.append(Column(x, min(raw), max(raw), sum(smooth) / len(smooth)))
        return visible

    def value_at(self, step: float) -> float | None:
        """The last raw value up to `step`; None if there is none."""
        index = bisect_right(self.x, step)
        return self.y[index - 1] if index else None

    def smoothed_at(self, step: float) -> float | None:
        """The smoothed value at `step`; None before the first and after the last one."""
        index = bisect_right(self.x, step)
        return self.smooth[index - 1] if index and step <= self.x[-1] else None

    @staticmethod
    def _with_blocks(
        values: "array[float]", blocks: "array[float]", start: int, end: int
    ) -> "array[float]":
        """values[start:end] with every complete block replaced by its cached value."""
        first, last = -(-start // BLOCK), end // BLOCK
        if first >= last:
            return values[start:end]
        return values[start : first * BLOCK] + blocks[first:last] + values[last * BLOCK : end]


class Log:
    """Everything read of one loss.csv: by column, and the series to draw."""

    def __init__(self, smoothing: float) -> None:
        self.smoothing = smoothing
        self.columns = {name: array("d") for name in COLUMNS}
        self.steps = self.columns["step"]
        self.foreign = 0  # rows out of order
        # epoch → first step, sum of losses, number of steps
        self._epochs: dict[float, list[float]] = {}
        self.series: dict[str, Series] = {}
        for name in dict.fromkeys((*METRICS, *OPTIONAL)):
            if name not in COST:
                # most rows have no value for these
                steps = array("d") if name in OPTIONAL else self.steps
                self.series[name] = Series(steps, smoothing_of(name, smoothing))
            if name in COLUMNS:
                self.columns[name] = self.series[name].y

    def extend(self, rows: Sequence[Row]) -> None:
        """Append rows. One whose step is not after the last one's is dropped and counted in
        `foreign`.
        """
        in_order, last = [], self.steps[-1] if self.steps else float("-inf")
        for row in rows:
            if row[0] > last:
                in_order.append(row)
                last = row[0]
        self.foreign += len(rows) - len(in_order)
        for name, values in zip(COLUMNS, zip(*in_order, strict=True), strict=False):
            if name in self.series:
                self.series[name].extend(values)
            else:
                self.columns[name].extend(values)
        for column, name in enumerate(OPTIONAL, len(COLUMNS)):
            cells = ((row[0], row[column]) for row in in_order if len(row) > column)
            # not NaN
            points = [
                (step, value) for step, value in cells if value is not None and value == value
            ]
            self.series[name].x.extend(step for step, _ in points)
            self.series[name].extend(value for _, value in points)
        for step, epoch, loss, *_ in in_order:
            sums = self._epochs.setdefault(epoch, [step, 0.0, 0])
            sums[1] += loss
            sums[2] += 1

    def smooth(self, strength: float) -> None:
        self.smoothing = strength
        for name, series in self.series.items():
            series.smooth_again(smoothing_of(name, strength))

    def flat(self, running: bool) -> tuple[int, float] | None:
        """The epoch from which the loss is flat, as `flat_epoch` defines it, and its first step.

        While the run is `running`, its last epoch is incomplete and does not count.
        """
        complete = list(self._epochs.values())[: -1 if running else None]
        epoch = flat_epoch([total / count for _, total, count in complete])
        return (epoch, self._epochs[epoch][0]) if epoch in self._epochs else None

    def final_loss(self, running: bool) -> float | None:
        """Mean loss of the last epoch; while `running`, of the last complete epoch if there is
        one.
        """
        epochs = reversed(self._epochs.values())
        last = next(epochs, None)
        if running:
            last = next(epochs, last)
        return last[1] / last[2] if last else None

    @property
    def epochs(self) -> int:
        """How many have begun."""
        return len(self._epochs)

    def index_at(self, step: float) -> int | None:
        """The index of the point nearest to `step`; None if there is no point."""
        if not self.steps:
            return None
        right = min(bisect_left(self.steps, step), len(self.steps) - 1)
        left = max(right - 1, 0)
        return left if abs(self.steps[left] - step) <= abs(self.steps[right] - step) else right

    def tokens_at(self, step: float) -> float:
        """The labelled tokens up to a step."""
        index = bisect_right(self.steps, step)
        return self.columns["tokens"][index - 1] if index else 0.0


class Cost:
    """What the telemetry of a run says: its pace, its memory."""

    def __init__(self, smoothing: float) -> None:
        self.recent: deque[Telemetry] = deque(maxlen=RECENT)
        self.series = {name: Series(array("d"), smoothing_of(name, smoothing)) for name in COST}

    def extend(self, rows: Sequence[Telemetry], log: Log) -> None:
        """Append rows, after `log` has read the steps that they tell of."""
        points: dict[str, list[tuple[float, float]]] = {name: [] for name in COST}
        for row in rows:
            before = self.recent[-1] if self.recent else None
            if before and row.seconds <= before.seconds:
                self.recent.clear()  # resumed by another process, whose clock starts at 0
            elif before and row.step > before.step:
                tokens = log.tokens_at(row.step) - log.tokens_at(before.step)
                points["tokens_per_second"].append(
                    (row.step, tokens / (row.seconds - before.seconds))
                )
            if row.measured:
                points["memory"].append((row.step, row.measured))
            self.recent.append(row)
        for name, series in self.series.items():
            last = series.x[-1] if series.x else -inf
            later = [point for point in points[name] if point[0] > last]
            series.x.extend(x for x, _ in later)
            series.extend(y for _, y in later)

    @property
    def seconds_per_step(self) -> float | None:
        """The pace of the last steps; None while they say too little: the first ones load and warm
        up.
        """
        first, last = (self.recent[0], self.recent[-1]) if self.recent else (None, None)
        if first is None or last is None or last.step - first.step < MIN_STEPS:
            return None
        return (last.seconds - first.seconds) / (last.step - first.step)

    def smooth(self, strength: float) -> None:
        for name, series in self.series.items():
            series.smooth_again(smoothing_of(name, strength))
