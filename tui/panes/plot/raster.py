"""A line as dots, two across and four down a cell: as bits of a braille character."""

from collections.abc import Iterable, Sequence
from math import floor

ACROSS, DOWN = 2, 4
BLANK = 0x2800  # the braille character without dots; its code plus the bits is a character
# Unicode bits of the left and right column of dots, from the top
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
Span = tuple[int, int]  # smallest and largest y, in dots


def spans(points: Iterable[tuple[float, float]], width: int) -> dict[int, Span]:
    """Column of dots → what the line through `points` covers of it, on a grid of `width` cells.

    Points are in cells from the top left, sorted by x: as x never decreases, a column of dots is
    one span from the lowest to the highest, which is ten times as fast as a line of dots between
    each two points.
    """
    covered: dict[int, Span] = {}

    def add(column: int, y: int) -> None:
        low, high = covered.get(column, (y, y))
        covered[column] = (y if y < low else low, y if y > high else high)

    columns, before = width * ACROSS, None
    for x, y in points:
        x, y = x * ACROSS, y * DOWN
        column = floor(x)
        if before is not None and (last := floor(before[0])) != column:
            dx, dy = x - before[0], y - before[1]
            for edge in range(max(last + 1, 0), min(column, columns) + 1):
                # the dots where the line crosses from one column to the next
                if 0 < edge < columns:
                    # not dy / dx, which can be infinite
                    crossing = floor(before[1] + dy * ((edge - before[0]) / dx))
                    add(edge - 1, crossing)
                    add(edge, crossing)
        if 0 <= column < columns:
            add(column, floor(y))
        before = (x, y)
    return covered


def braille(
    points: Sequence[tuple[float, float]], width: int, height: int, bold: bool = False
) -> dict[tuple[int, int], str]:
    """Cell (x, y) → the character that draws the line through `points` there; clipped to the grid.

    A `bold` line is a dot higher.
    """
    bits: dict[tuple[int, int], int] = {}
    for column, (low, high) in spans(points, width).items():
        top, end = max(low, 0), min(high + bold, height * DOWN - 1)
        for y in range(top // DOWN, end // DOWN + 1):
            cell = column // ACROSS, y
            dots = _DOTS[column % ACROSS][max(top - y * DOWN, 0) : end - y * DOWN + 1]
            bits[cell] = bits.get(cell, 0) | sum(dots)
    return {cell: chr(BLANK | dots) for cell, dots in bits.items()}
