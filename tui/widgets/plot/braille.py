"""Lines as braille dots, two across and four down in a cell. Their x never decreases: they are quick to draw."""

from collections.abc import Iterator, Sequence
from math import floor

ACROSS, DOWN = 2, 4
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))  # the bit of each dot of the left and the right half
_SPANS = [[[sum(half[top : end + 1]) for end in range(DOWN)] for top in range(DOWN)] for half in _DOTS]
Point = tuple[float, float]
Cell = tuple[int, int]


def cells(points: Sequence[Point], width: int, height: int) -> dict[Cell, str]:
    """The character of every cell of `width` × `height` that the line through `points` (in cells, from the top) meets.

    What is outside is left out; `points` must be in order of x.
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
    """Column of dots → highest and lowest dot of the line in it."""
    spans: dict[int, tuple[int, int]] = {}
    for column, y in _dots(points, columns):
        low, high = spans.get(column, (y, y))
        spans[column] = (y if y < low else low, y if y > high else high)
    return spans


def _dots(points: Sequence[Point], columns: int) -> Iterator[tuple[int, int]]:
    """Every point, and between two points the line's height where it goes from one column to the next."""
    before: Point | None = None
    for x, y in points:
        x, y = x * ACROSS, y * DOWN
        column = floor(x)
        if before is not None and floor(before[0]) != column:
            wide, high = x - before[0], y - before[1]
            for edge in range(max(floor(before[0]) + 1, 0), min(column, columns) + 1):
                height = floor(before[1] + high * ((edge - before[0]) / wide))  # no slope: it can be infinite
                yield from ((edge - 1, height), (edge, height)) if 0 < edge < columns else ()
        if 0 <= column < columns:
            yield column, floor(y)
        before = (x, y)
