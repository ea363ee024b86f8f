"""What a chart draws, as plain numbers: curves and the visible ranges."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import isfinite, log10

Range = tuple[float, float]


@dataclass(frozen=True)
class Column:
    """The steps in one column of the chart: x, minimum and maximum of the raw values, mean of the smoothed ones."""

    x: float
    low: float
    high: float
    mean: float


@dataclass(frozen=True)
class Curve:
    """A run's columns, its colour as #rrggbb, its symbol, the step at which it became flat, and its evaluations.

    A `dim` curve is drawn as a line only. A `stray` (diverged) curve does not affect the y range.
    """

    columns: Sequence[Column]
    color: str
    sign: str
    flat: float | None = None
    held_out: Sequence[Column] = ()
    dim: bool = False
    stray: bool = False

    def flat_column(self) -> Column | None:
        """The column at which it became flat, if that is in view."""
        if self.flat is None or not self.columns or not self.columns[0].x <= self.flat <= self.columns[-1].x:
            return None
        return nearest(self.columns, self.flat)


@dataclass(frozen=True)
class View:
    """The visible range of steps `x` and of values `y` (None: fit to the curves), and the step of the cursor.

    With `log`, `y` is in exponents of ten.
    """

    x: Range
    y: Range | None = None
    log: bool = False
    cursor: float | None = None


def power_of_ten(exponent: float) -> float:
    """10^exponent, clamped to the range of a float."""
    return float(10 ** min(max(exponent, -307.0), 308.0))


def to_log10(curve: Curve) -> Curve:
    """The curve with log10 of its values. Where `low` or `mean` is not positive, the next higher value is used."""

    def logarithms(columns: Sequence[Column]) -> list[Column]:
        exponents = []
        for column in columns:
            if column.high > 0:
                high = log10(column.high)
                mean = log10(column.mean) if column.mean > 0 else high
                low = log10(column.low) if column.low > 0 else min(mean, high)
                exponents.append(Column(column.x, low, high, mean))
        return exponents

    return replace(curve, columns=logarithms(curve.columns), held_out=logarithms(curve.held_out))


def range_of(curves: Iterable[Curve]) -> Range:
    """The y range of all curves with a small margin; (0, 1) if there are no values."""
    every = list(curves)
    decisive = [curve for curve in every if not curve.stray] or every
    columns = [column for curve in decisive for column in (*curve.columns, *curve.held_out)]
    values = [value for c in columns for value in (c.low, c.high, c.mean) if isfinite(value)]
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    spread = high - low if high - low > 1e-9 * max(abs(low), abs(high)) else 0.0  # a smaller one is a rounding error
    margin = spread * 0.04 or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def is_drawable(range_: Range) -> bool:
    """Whether a chart can draw it: wider than a rounding error, and finite when multiplied by a number of cells."""
    low, high = range_
    return isfinite((high - low) * 1e6) and high - low > 1e-9 * max(abs(low), abs(high))


def nearest(columns: Sequence[Column], x: float) -> Column:
    return min(columns, key=lambda column: abs(column.x - x))
