"""Values over time in a few rows of cells, filled from below."""

from collections.abc import Sequence
from itertools import pairwise
from math import isfinite

EIGHTHS = " ▁▂▃▄▅▆▇█"


def sparkline(
    values: Sequence[float], width: int, low: float | None = None, high: float | None = None
) -> str:
    """One row: the newest value at the right; `low` and `high` are those of the values if not
    given.
    """
    return area(values, width, 1, low, high)[0]


def area(
    values: Sequence[float],
    width: int,
    height: int,
    low: float | None = None,
    high: float | None = None,
) -> list[str]:
    """`height` rows of `width` cells, from the top. A column is the mean of its values.

    The lowest value is an eighth of a cell high, so that a constant is a line; one that is not
    finite is blank. Fewer values than columns are not stretched: they stand at the right.
    """
    columns = [_mean(part) for part in _parts(values, width)]
    finite = [value for value in columns if value is not None]
    bottom = min(finite, default=0.0) if low is None else low
    top = max(finite, default=1.0) if high is None else high
    rows = [[" "] * width for _ in range(height)]
    for x, value in enumerate(columns, width - len(columns)):
        if value is None:
            continue
        share = min(max((value - bottom) / (top - bottom), 0.0), 1.0) if top > bottom else 0.0
        eighths = 1 + round(share * (8 * height - 1))
        for y in range(height):
            rows[height - 1 - y][x] = EIGHTHS[min(max(eighths - 8 * y, 0), 8)]
    return ["".join(row) for row in rows]


def _parts(values: Sequence[float], count: int) -> list[Sequence[float]]:
    """The values in at most `count` parts of equal length."""
    if len(values) <= count:
        return [values[i : i + 1] for i in range(len(values))]
    edges = [len(values) * i // count for i in range(count + 1)]
    return [values[start:end] for start, end in pairwise(edges)]


def _mean(values: Sequence[float]) -> float | None:
    finite = [value for value in values if isfinite(value)]
    return sum(finite) / len(finite) if finite else None
