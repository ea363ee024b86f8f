"""Lines as braille dots, two across and four down per cell. Fast because x never decreases along a line."""

from collections.abc import Iterator, Sequence
from math import floor

ACROSS, DOWN = 2, 4
_DOTS = (
    (0x01, 0x02, 0x04, 0x40),
    (0x08, 0x10, 0x20, 0x80),
)  # Unicode bits of the left and right column of dots, from the top
_SPANS = [[[sum(half[top : end + 1]) for end in range(DOWN)] for top in range(DOWN)] for half in _DOTS]
Point = tuple[float, float]
Cell = tuple[int, int]


def cells(points: Sequence[Point], width: int, height: int) -> dict[Cell, str]:
    """Characters that draw the line through `points` on a grid of `width` × `height` cells, by cell (x, y).

    Points are in cells from the top left, sorted by x. What lies outside the grid is clipped.
    """
    bits: dict[Cell, int] = {}
    bottom = height * DOWN - 1
    for column, (low, high) in _spans(points, width * ACROSS).items():
        if low > bottom or high < 0:
            continue
        top, end = max(low, 0), min(high, bottom)
        spans, x = _SPANS[column % ACROSS], column // ACROSS
        first, last = top // DOWN, end // DOWN
        for y in range(first, last + 1):
            span = spans[top % DOWN if y == first else 0][end % DOWN if y == last else DOWN - 1]
            bits[x, y] = bits.get((x, y), 0) | span
    return {cell: chr(0x2800 | dots) for cell, dots in bits.items()}


def _spans(points: Sequence[Point], columns: int) -> dict[int, tuple[int, int]]:
    """Column of dots → smallest and largest y of the line in it, in dots."""
    spans: dict[int, tuple[int, int]] = {}
    for column, y in _dots(points, columns):
        low, high = spans.get(column, (y, y))
        spans[column] = (y if y < low else low, y if y > high else high)
    return spans


def _dots(points: Sequence[Point], columns: int) -> Iterator[tuple[int, int]]:
    """Every point as a dot, and the two dots where the line crosses from one column of dots to the next."""
    before: Point | None = None
    for x, y in points:
        x, y = x * ACROSS, y * DOWN
        column = floor(x)
        if before is not None and floor(before[0]) != column:
            dx, dy = x - before[0], y - before[1]
            for edge in range(max(floor(before[0]) + 1, 0), min(column, columns) + 1):
                height = floor(before[1] + dy * ((edge - before[0]) / dx))  # not dy / dx, which can be infinite
                yield from ((edge - 1, height), (edge, height)) if 0 < edge < columns else ()
        if 0 <= column < columns:
            yield column, floor(y)
        before = (x, y)
