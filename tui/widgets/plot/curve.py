"""What a chart draws, as plain numbers: curves, the window on them, and the arithmetic of both."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import isfinite, log10

Range = tuple[float, float]


@dataclass(frozen=True)
class Column:
    """What falls into a column of the picture: where, least and most of the raw values, mean of the smoothed."""

    x: float
    low: float
    high: float
    mean: float


@dataclass(frozen=True)
class Curve:
    """One run's columns, its colour as #rrggbb, its sign, the step from which it is flat, and its evaluations.

    One that is `dim` is a line alone; a `stray` one does not decide which values are shown.
    """

    columns: Sequence[Column]
    color: str
    sign: str
    flat: float | None = None
    held_out: Sequence[Column] = ()
    dim: bool = False
    stray: bool = False

    def mark(self) -> Column | None:
        """Where to say that it is flat, if that is in view."""
        if self.flat is None or not self.columns or not self.columns[0].x <= self.flat <= self.columns[-1].x:
            return None
        return nearest(self.columns, self.flat)


@dataclass(frozen=True)
class View:
    """What of the curves is shown: steps from and to, values from and to (None: all that is there), logarithms or not,
    and the step of the cursor. With `log`, `y` is in powers of ten."""

    x: Range
    y: Range | None = None
    log: bool = False
    cursor: float | None = None


def power_of_ten(exponent: float) -> float:
    """10^exponent, or the nearest number that there is."""
    return float(10 ** min(max(exponent, -307.0), 308.0))


def in_powers(curve: Curve) -> Curve:
    """Values as exponents of ten; what is not above zero has none: a band begins at its column's mean or greatest."""
    return replace(curve, columns=_logarithms(curve.columns), held_out=_logarithms(curve.held_out))


def _logarithms(columns: Sequence[Column]) -> list[Column]:
    found = []
    for column in columns:
        if column.high > 0:
            high = log10(column.high)
            mean = log10(column.mean) if column.mean > 0 else high
            low = log10(column.low) if column.low > 0 else min(mean, high)
            found.append(Column(column.x, low, high, mean))
    return found


def range_of(curves: Iterable[Curve]) -> Range:
    """From the least to the greatest value of all and a little more; 0 to 1 if there is none."""
    every = list(curves)
    decisive = [curve for curve in every if not curve.stray] or every
    columns = [column for curve in decisive for column in (*curve.columns, *curve.held_out)]
    values = [value for c in columns for value in (c.low, c.high, c.mean) if isfinite(value)]
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    spread = high - low if high - low > 1e-9 * max(abs(low), abs(high)) else 0.0  # less is only rounding
    margin = spread * 0.04 or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def possible(range_: Range) -> bool:
    """Whether a chart can draw it: wider than rounding, and narrow enough to be multiplied with the chart's cells."""
    low, high = range_
    return isfinite((high - low) * 1e6) and high - low > 1e-9 * max(abs(low), abs(high))


def between(one: Column, other: Column) -> Column:
    """Half way."""
    y = (one.mean + other.mean) / 2
    return Column((one.x + other.x) / 2, y, y, y)


def nearest(columns: Sequence[Column], x: float) -> Column:
    return min(columns, key=lambda column: abs(column.x - x))


def scaled(range_: Range, centre: float, factor: float) -> Range:
    low, high = (centre + (end - centre) * factor for end in range_)
    return low, high


def shifted(range_: Range, part: float) -> Range:
    by = (range_[1] - range_[0]) * part
    return range_[0] + by, range_[1] + by
