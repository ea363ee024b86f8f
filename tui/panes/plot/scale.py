"""An axis: its range, a linear or logarithmic scale, ticks, and numbers as they are written beside
it.
"""

from collections.abc import Iterable
from math import ceil, floor, isfinite, log10

Range = tuple[float, float]
DECADE = 10.0  # a ratio of largest to smallest value from which a logarithmic scale shows more
TINY, HUGE = -307.0, 308.0  # exponents of ten that a float can hold
SMALLEST = 1e-290  # range whose inverse is finite when multiplied by a number of cells
MARGIN = 0.04  # of the range, above the largest and below the smallest value


def fit(values: Iterable[float], log: bool = False) -> Range:
    """The range of the finite values with a small margin; with `log`, of the exponents of ten of
    those above 0.

    (0, 1) if there is no such value.
    """
    known = [value for value in values if isfinite(value)]
    if log:
        known = [log10(value) for value in known if value > 0]
    if not known:
        return 0.0, 1.0
    low, high = min(known), max(known)
    margin = 0.5 if log else max(abs(high) * 0.1, SMALLEST)
    if is_drawable((low, high)):
        margin = (high - low) * MARGIN
    return low - margin, high + margin


def spans_decade(values: Iterable[float]) -> bool:
    """Whether all values are above 0 and the largest is at least ten times the smallest."""
    finite = [value for value in values if isfinite(value)]
    return bool(finite) and min(finite) > 0 and max(finite) >= DECADE * min(finite)


def is_drawable(range_: Range) -> bool:
    """Whether a plot can draw it: wider than a rounding error, and finite when multiplied by a
    number of cells.
    """
    low, high = range_
    return isfinite((high - low) * 1e6) and high - low >= max(
        1e-9 * abs(low), 1e-9 * abs(high), SMALLEST
    )


def power_of_ten(exponent: float) -> float:
    """10^exponent, clamped to the range of a float."""
    return float(10 ** min(max(exponent, TINY), HUGE))


def ticks(range_: Range, most: int, log: bool = False) -> list[tuple[float, str]]:
    """At most `most` positions in the range and their labels: at 1, 2 or 5 times a power of ten.

    With `log`, range and positions are exponents of ten.
    """
    low, high = range_
    most = max(most, 1)
    if log and high - low > 0.5:  # a narrower range is clearer with equal steps of the exponent
        decades = [float(power) for power in range(ceil(low), floor(high) + 1)]
        at = decades[:: max(ceil(len(decades) / most), 1)]
        for factors in ((1, 3), (1, 2, 5)):
            finer = [p + log10(f) for p in range(floor(low), floor(high) + 1) for f in factors]
            finer = [tick for tick in finer if low <= tick <= high]
            at = finer if len(finer) <= most else at
    else:
        step = _nice((high - low) / most)
        first = ceil(low / step)
        at = [step * (first + i) for i in range(most + 1) if step * (first + i) <= high]
    return [(tick, number(power_of_ten(tick) if log else tick)) for tick in at[:most]]


def number(value: float) -> str:
    """1,200 · 0.05 · 2.5e-05 · 1.2M: at most four digits that count."""
    if abs(value) >= 1e6:
        return f"{value / 1e6:.4g}M" if abs(value) < 1e10 else f"{value:.3g}"
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"


def _nice(step: float) -> float:
    """The smallest of 1, 2 or 5 times a power of ten that is at least `step`."""
    power = 10.0 ** floor(log10(step))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step * (1 - 1e-9))
