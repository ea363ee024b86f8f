"""A run's numbers in plain arrays: smoothed as they come, and reduced to the columns of a picture."""

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from math import isfinite, nan

from pipeline.project.logs.run_log import COLUMNS, OPTIONAL, Step, flat_from
from tui.widgets.plot.curve import Column

Row = tuple[float, ...]  # in the order of COLUMNS, then, where the log has them, OPTIONAL: NaN is none
BLOCK = 32  # points of which least, greatest and sum are known beforehand: columns of hundreds need not look at each
QUANTITIES = ("loss", "learning_rate", "grad_norm", "divergence")  # what is drawn, each in its panel
HELD_OUT = "eval_loss"  # and this beside the loss
UNSMOOTHED = ("learning_rate", HELD_OUT)  # no noise, or few values: smoothing would only make them late


def parse_step(line: str) -> Row:
    """A line of loss.csv. Raises ValueError."""
    step, epoch, loss, rate, norm, tokens = line.split(",")[: len(COLUMNS)]
    return int(step), int(epoch), float(loss), float(rate), float(norm), int(tokens)


def step_parser(header: str) -> Callable[[str], Row]:
    """What reads the lines below this header: with the optional columns where there is one of them."""
    columns = header.strip().split(",")
    places = [columns.index(name) if name in columns else None for name in OPTIONAL]

    def parse(line: str) -> Row:
        cells = line.split(",")
        more = (float(cells[at]) if at is not None and cells[at : at + 1] not in ([], [""]) else nan for at in places)
        return *parse_step(line), *more

    return parse_step if places == [None] * len(places) else parse


class Series:
    """One quantity over the steps. `smooth` is an exponential moving average without the bias of its start."""

    def __init__(self, x: "array[float]", strength: float) -> None:
        self.x, self.y, self.smooth = x, array("d"), array("d")
        self.strength = strength
        self._mean = self._weight = 0.0
        self._finite = True
        self._lows, self._highs, self._sums = array("d"), array("d"), array("d")  # one of each a block

    def extend(self, values: Iterable[float]) -> None:
        """Append raw values and their smoothed ones; one that is not finite leaves the average as it is."""
        strength, mean, weight = self.strength, self._mean, self._weight
        self.y.extend(values)
        smoothed = []
        for value in self.y[len(self.smooth) :]:
            if isfinite(value):
                mean = strength * mean + (1 - strength) * value
                weight = strength * weight + (1 - strength)
            else:
                self._finite = False
            smoothed.append(mean / weight if weight else value)
        self.smooth.extend(smoothed)
        self._mean, self._weight = mean, weight
        for start in range(len(self._sums) * BLOCK, len(self.y) - BLOCK + 1, BLOCK):
            self._lows.append(min(self.y[start : start + BLOCK]))
            self._highs.append(max(self.y[start : start + BLOCK]))
            self._sums.append(sum(self.smooth[start : start + BLOCK]))

    def smoothed_with(self, strength: float) -> "Series":
        """The same values, smoothed otherwise."""
        series = Series(self.x, strength)
        series.extend(self.y)
        return series

    def visible(self, first: float, last: float, columns: int) -> list[Column]:
        """At most `columns` columns of equal width from step `first` to `last`; those without a point are left out.

        Every finite point in the range is between `low` and `high` of its column.
        """
        width = (last - first) / columns
        edges = [bisect_left(self.x, first + width * i) for i in range(columns)]
        edges.append(bisect_right(self.x, last))
        found = []
        for start, end in pairwise(edges):
            if start < end and (column := self._column(start, end)):
                found.append(column)
        return found

    def until(self, step: float) -> float | None:
        """The last raw value that there was at `step`."""
        at = bisect_right(self.x, step)
        return self.y[at - 1] if at else None

    def _column(self, start: int, end: int) -> Column | None:
        x = (self.x[start] + self.x[end - 1]) / 2
        if not self._finite:
            raw, smooth = ([v for v in values[start:end] if isfinite(v)] for values in (self.y, self.smooth))
            return Column(x, min(raw), max(raw), sum(smooth) / len(smooth)) if raw else None
        low, high = min(self._parts(self.y, self._lows, start, end)), max(self._parts(self.y, self._highs, start, end))
        return Column(x, low, high, sum(self._parts(self.smooth, self._sums, start, end)) / (end - start))

    @staticmethod
    def _parts(values: "array[float]", blocks: "array[float]", start: int, end: int) -> "array[float]":
        """Stands for values[start:end]: whole blocks by their one value, what is before and after as it is."""
        first, last = -(-start // BLOCK), end // BLOCK
        if first >= last:
            return values[start:end]
        return values[start : first * BLOCK] + blocks[first:last] + values[last * BLOCK : end]


class Log:
    """All that was read of one loss.csv, by column, and the quantities to draw."""

    def __init__(self, smoothing: float) -> None:
        self.columns = {name: array("d") for name in COLUMNS}
        self.steps = self.columns["step"]
        self.foreign = 0  # rows out of order
        self._epochs: dict[float, list[float]] = {}  # epoch → first step, sum of losses, how many
        self.series: dict[str, Series] = {}
        for name in (*QUANTITIES, HELD_OUT):
            steps = array("d") if name in OPTIONAL else self.steps  # most rows have none of these
            self.series[name] = Series(steps, _strength(name, smoothing))
            if name in COLUMNS:
                self.columns[name] = self.series[name].y

    def extend(self, rows: Sequence[Row]) -> None:
        """Append rows; one whose step is not after the last is another's and is counted."""
        kept, last = [], self.steps[-1] if self.steps else float("-inf")
        for row in rows:
            if row[0] > last:
                kept.append(row)
                last = row[0]
        self.foreign += len(rows) - len(kept)
        for name, values in zip(COLUMNS, zip(*kept, strict=True), strict=False):
            if name in self.series:
                self.series[name].extend(values)
            else:
                self.columns[name].extend(values)
        self._extend_optional(kept)
        for step, epoch, loss, *_ in kept:
            seen = self._epochs.setdefault(epoch, [step, 0.0, 0])
            seen[1] += loss
            seen[2] += 1

    def _extend_optional(self, rows: Sequence[Row]) -> None:
        for place, name in enumerate(OPTIONAL, len(COLUMNS)):
            found = [(row[0], row[place]) for row in rows if len(row) > place and row[place] == row[place]]
            self.series[name].x.extend(step for step, _ in found)
            self.series[name].extend(value for _, value in found)

    def smooth(self, strength: float) -> None:
        self.series = {name: series.smoothed_with(_strength(name, strength)) for name, series in self.series.items()}
        self.columns.update({name: self.series[name].y for name in COLUMNS if name in self.series})

    def flat(self, going_on: bool) -> tuple[int, float] | None:
        """The epoch from which the loss is flat, as `flat_from` defines it, and its first step.

        While the run is going on, its last epoch is not whole yet and does not count.
        """
        whole = list(self._epochs.items())[: -1 if going_on else None]
        means = [Step(int(first), int(epoch), total / n, 0, 0, 0) for epoch, (first, total, n) in whole]
        epoch = flat_from(means)
        return (epoch, self._epochs[epoch][0]) if epoch in self._epochs else None

    def settled(self, going_on: bool) -> float | None:
        """Mean loss of the last epoch; while the run is going on, of the last that is whole, once there is one."""
        epochs = reversed(self._epochs.values())
        last = next(epochs, None)
        if going_on:
            last = next(epochs, last)
        return last[1] / last[2] if last else None

    def at(self, step: float) -> int | None:
        """The index of the point nearest to `step`; None if there is no point."""
        if not self.steps:
            return None
        right = min(bisect_left(self.steps, step), len(self.steps) - 1)
        left = max(right - 1, 0)
        return left if abs(self.steps[left] - step) <= abs(self.steps[right] - step) else right


def _strength(name: str, smoothing: float) -> float:
    return 0.0 if name in UNSMOOTHED else smoothing
