"""Lines over a common x, as rows of styled text: light axes, the newest value of each line beside
its end.

Pure functions: points in, cells out. `text` makes a `Text` of them for any widget; `Chart` shows
them live.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import isfinite, log10
from typing import NamedTuple

from rich.cells import cell_len
from rich.text import Text

from tui.widgets.plot.raster import braille
from tui.widgets.plot.scale import Range, fit, is_drawable, ticks
from tui.widgets.text import pad_or_truncate

Point = tuple[float, float]
Row = list[tuple[str, str]]  # runs of text and their style, as Rich reads it
EVALUATED, FLAT, GRID, CURSOR = "×", "»", "┈", "│"
ROWS_PER_TICK, CELLS_PER_TICK = 3, 10  # at least between two ticks
# of the width, for the labels at line ends; cells, or there are none
MAX_LABELS, MIN_LABEL = 0.4, 6
MARK_EVERY = 3  # cells between two marks, at least
# cells between two signs on a line; of it, from one line's to the next one's
SIGN_EVERY, PHASE = 18, 0.37


@dataclass(frozen=True)
class Line:
    """Points sorted by x, a style, and what is drawn of it besides: later lines lie on top of
    earlier ones.

    `band`: x, low, high of what was smoothed, as a faint background. `marks`: single measurements,
    as × on a line of dots. `flat`: a point marked ». `sign`, `label` and `value` are written beside
    the end. A `bold` line is two dots high, a `quiet` one has neither label nor sign, and a `stray`
    one does not affect the range of y.
    """

    points: Sequence[Point]
    style: str = ""
    label: str = ""
    value: str = ""
    sign: str = ""
    band: Sequence[tuple[float, float, float]] = ()
    band_style: str = ""
    marks: Sequence[Point] = ()
    flat: Point | None = None
    bold: bool = False
    quiet: bool = False
    stray: bool = False

    def values(self) -> Iterable[float]:
        """What the range of y must hold."""
        yield from (y for _, y in self.points)
        yield from (y for _, y in self.marks)


@dataclass(frozen=True)
class View:
    """The visible x and y (None: all values; with `log` exponents of ten), and the x of the
    cursor.
    """

    x: Range | None = None
    y: Range | None = None
    log: bool = False
    cursor: float | None = None


class Ink(NamedTuple):
    """Styles of what is not data."""

    ticks: str = "dim"
    grid: str = "dim"
    cursor: str = ""


WHOLE, PLAIN = View(), Ink()


class LinePlot(NamedTuple):
    """The rows from the top; the ranges drawn; where the area of the lines is, in cells."""

    rows: list[Row]
    x: Range
    y: Range
    left: int
    width: int

    def x_at(self, cell: int) -> float | None:
        """The x in a column of the plot; None beside the area."""
        if not self.left <= cell < self.left + self.width:
            return None
        return self.x[0] + (self.x[1] - self.x[0]) * (cell - self.left + 0.5) / self.width


@dataclass
class _Grid:
    """Cells that lie on top of each other: the last one written is seen."""

    width: int
    height: int
    chars: list[list[str]] = field(init=False)
    styles: list[list[str]] = field(init=False)

    def __post_init__(self) -> None:
        self.chars = [[" "] * self.width for _ in range(self.height)]
        self.styles = [[""] * self.width for _ in range(self.height)]

    def put(self, x: int, y: int, text: str, style: str) -> None:
        if 0 <= y < self.height:
            for at, char in enumerate(text, x):
                if 0 <= at < self.width:
                    self.chars[y][at], self.styles[y][at] = char, style

    def rows(self) -> list[Row]:
        rows = []
        for chars, styles in zip(self.chars, self.styles, strict=True):
            row: Row = []
            start = 0
            for x in range(1, self.width + 1):
                if x == self.width or styles[x] != styles[start]:
                    row.append(("".join(chars[start:x]), styles[start]))
                    start = x
            rows.append(row)
        return rows


def line_plot(
    lines: Sequence[Line],
    width: int,
    height: int,
    view: View = WHOLE,
    ink: Ink = PLAIN,
    *,
    x_axis: bool = True,
    y_axis: bool = True,
    labels: bool = True,
    signs: bool = False,
) -> LinePlot:
    """The lines in `width` × `height` cells. `signs`: also along the lines, for a terminal without
    colours.
    """
    x = view.x or _x_range(lines)
    y = view.y or y_range(lines, view.log)
    grid = _Grid(width, height)
    x_axis, y_axis = x_axis and height > 3, y_axis and width > 20
    rows = height - 1 if x_axis else height
    y_ticks = ticks(y, max(rows // ROWS_PER_TICK, 2), view.log) if y_axis else []
    left = max((cell_len(label) for _, label in y_ticks), default=-1) + 1
    ends = _ends(lines, x, view.log) if labels else []
    most = int(width * MAX_LABELS)
    right = min(
        max(
            (cell_len(f"{line.sign} {line.label} {line.value}") + 1 for _, line in ends), default=0
        ),
        most,
    )
    right = right if right >= MIN_LABEL else 0
    area = max(width - left - right, 1)
    # A hair less than the area, so that the last x and the smallest y are in it.
    across, down = (area - 1e-6) / (x[1] - x[0]), (rows - 1e-6) / (y[1] - y[0])

    def cell(point: Point) -> Point | None:
        """The position of a point in the area, in cells; None if it has none on this scale."""
        value = point[1]
        if view.log:
            if value <= 0:
                return None
            value = log10(value)
        at = (point[0] - x[0]) * across, (y[1] - value) * down
        return at if isfinite(value) and abs(at[1]) < 1e9 else None

    for at, label in y_ticks:
        row = min(int((y[1] - at) * down), rows - 1)
        grid.put(left, row, GRID * area, ink.grid)
        grid.put(0, row, label.rjust(left - 1), ink.ticks)
    if x_axis:
        _draw_x_ticks(grid, x, left, area, ink)
    canvas = _Area(grid, left, area, rows)
    for line in lines:
        if line.band:
            edges = ((at, value) for at, *ends_of_span in line.band for value in ends_of_span)
            canvas.line([p for point in edges if (p := cell(point))], line.band_style)
    if view.cursor is not None:
        column = int((view.cursor - x[0]) * across)
        for row in range(rows):
            canvas.put(column, row, CURSOR, ink.cursor)
    drawn = [[p for point in line.points if (p := cell(point))] for line in lines]
    for line, points in zip(lines, drawn, strict=True):
        canvas.line(points, line.style, bold=line.bold)
    for number, (line, points) in enumerate(zip(lines, drawn, strict=True)):
        canvas.marks([p for point in line.marks if (p := cell(point))], line.style)
        if signs and not line.quiet:
            canvas.signs(points, line.sign, line.style, number)
        if line.flat and (p := cell(line.flat)):
            canvas.put(int(p[0]), int(p[1]), FLAT, f"bold {line.style}")
    if right:
        for row, line in _spread(
            [(p[1] if (p := cell(point)) else 0.0, line) for point, line in ends], rows
        ):
            room = right - 1 - cell_len(line.value) - 1
            name = pad_or_truncate(f"{line.sign} {line.label}".strip(), room) if room > 0 else ""
            grid.put(
                width - right + 1,
                row,
                f"{name} {line.value}",
                f"bold {line.style}" if line.bold else line.style,
            )
    return LinePlot(grid.rows(), x, y, left, area)


def y_range(lines: Sequence[Line], log: bool) -> Range:
    """The range of the values of all lines; a stray one counts only where all are."""
    decisive = [line for line in lines if not line.stray] or lines
    y = fit((value for line in decisive for value in line.values()), log)
    return y if is_drawable(y) else (0.0, 1.0)


def text(rows: Iterable[Row]) -> Text:
    """The rows as one Text, for a Static."""
    return Text("\n", no_wrap=True).join(Text.assemble(*row) for row in rows)


def _x_range(lines: Sequence[Line]) -> Range:
    every = [
        x
        for line in lines
        for points in (line.points, line.marks)
        for x, _ in points[:1] + points[-1:]  # type: ignore[operator]
    ]
    low, high = min(every, default=0.0), max(every, default=1.0)
    margin = max(1.0, abs(low) * 1e-6)
    return (low, high) if is_drawable((low, high)) else (low - margin, low + margin)


def _draw_x_ticks(grid: _Grid, x: Range, left: int, area: int, ink: Ink) -> None:
    """Labels below the area, centred below their x, none cut and none over another."""
    free = 0
    for at, label in ticks(x, max(area // CELLS_PER_TICK, 2)):
        centre = left + int((at - x[0]) * area / (x[1] - x[0]))
        start = min(max(centre - len(label) // 2, 0), grid.width - len(label))
        if start >= free:
            grid.put(start, grid.height - 1, label, ink.ticks)
            free = start + len(label) + 1


def _ends(lines: Sequence[Line], x: Range, log: bool) -> list[tuple[Point, Line]]:
    """The last visible point of each line that has a label."""
    ends = []
    for line in lines:
        points = [point for point in (line.points or line.marks) if x[0] <= point[0] <= x[1]]
        points = [point for point in points if point[1] > 0] if log else points
        if points and line.label and not line.quiet:
            ends.append((points[-1], line))
    return ends


def _spread(wanted: Sequence[tuple[float, Line]], rows: int) -> list[tuple[int, Line]]:
    """A row of its own for each label: the wanted one, or the next free one. Too many: the last
    lines' stay.
    """
    wanted = sorted(wanted[-rows:], key=lambda end: end[0])
    at: list[int] = []
    for i, (row, _) in enumerate(wanted):
        first, last = (at[-1] + 1 if at else 0), rows - len(wanted) + i
        at.append(min(max(int(min(row, rows)), first), last))
    return [(row, line) for row, (_, line) in zip(at, wanted, strict=True)]


@dataclass(frozen=True)
class _Area:
    """The part of the grid in which lines are drawn; positions are in cells from its top left."""

    grid: _Grid
    left: int
    width: int
    height: int

    def put(self, x: int, y: int, char: str, style: str) -> None:
        if 0 <= x < self.width and 0 <= y < self.height:
            self.grid.put(self.left + x, y, char, style)

    def line(self, points: Sequence[Point], style: str, bold: bool = False) -> None:
        for (x, y), char in braille(points, self.width, self.height, bold).items():
            self.grid.put(self.left + x, y, char, style)

    def marks(self, points: Sequence[Point], style: str) -> None:
        """A line of dots through single measurements, and × on those that are not too close to the
        one before.
        """
        for (x, y), char in braille(points, self.width, self.height).items():
            if x % 3 == 1:
                self.grid.put(self.left + x, y, char, style)
        before = -float(MARK_EVERY)
        for across, down in points:
            if across - before >= MARK_EVERY:
                self.put(int(across), int(down), EVALUATED, f"bold {style}")
                before = across

    def signs(self, points: Sequence[Point], sign: str, style: str, number: int) -> None:
        """Its sign at every so many cells, at other columns than the other lines'."""
        for i in range(self.width // SIGN_EVERY + 1):
            wanted = SIGN_EVERY * (i + (number * PHASE + 0.3) % 1)
            if points and points[0][0] <= wanted <= points[-1][0]:
                x, y = min(points, key=lambda point: abs(point[0] - wanted))
                self.put(int(x), int(y), sign, f"bold {style}")
