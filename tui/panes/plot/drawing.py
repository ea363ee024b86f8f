"""Draws series in cells: light axes, lines with their newest values beside their ends, points with
labels that never overlap, bars, rules.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil, inf, isfinite, isnan, nan
from typing import NamedTuple, TypeVar

from rich.cells import cell_len
from textual.content import Content

from tui.panes.plot.canvas import Canvas
from tui.panes.plot.raster import braille
from tui.panes.plot.series import XY, Axis, Bars, Line, Point, Rule, Scale, Series
from tui.widgets.cells import pad_or_truncate

EVALUATED, FLAT, GRID, LEVEL, RULE, MARK = "×", "»", "┈", "╌", "│", "▲"
EIGHTHS = " ▁▂▃▄▅▆▇█"
ROWS_PER_TICK, CELLS_PER_TICK = 3, 10  # at least between two ticks
# of the width, for the labels at line ends; cells, or there are none
MAX_LABELS, MIN_LABEL = 0.4, 6
MARK_EVERY = 3  # cells between two marks, at least
# cells between two signs on a line; of it, from one line's to the next one's
SIGN_EVERY, PHASE = 18, 0.37
INSET = 2  # cells between the edge and the first and the last point
AROUND = (-1, 1, -2, 2, -3, 3)  # rows in which a label may be, from its point's
NO_Y_AXIS, NO_X_AXIS = 20, 3  # cells and rows up to which there is no room for an axis
TICK, FAINT, CURSOR = "$foreground 65%", "$foreground 18%", "$accent"
S = TypeVar("S")


class Drawing(NamedTuple):
    """The rows from the top; the scales drawn; where the area of the series is, in cells."""

    rows: list[Content]
    x: Scale
    y: Scale
    left: int
    width: int

    def x_at(self, cell: int) -> float | None:
        """The x in a column of the plot; None beside the area."""
        if not self.left <= cell < self.left + self.width:
            return None
        return self.x.value_at((cell - self.left + 0.5) / self.width)


def draw(
    series: Sequence[Series],
    width: int,
    height: int,
    x_axis: Axis = Axis(),  # noqa: B008  # it is frozen
    y_axis: Axis = Axis(),  # noqa: B008
    *,
    cursor: float | None = None,
    signs: bool = False,
) -> Drawing:
    """The series in `width` × `height` cells, with a rule at the x of the cursor.

    `signs`: also along the lines, for a terminal without colours.
    """
    lines, points = _of(Line, series), _of(Point, series)
    bars, rules = _of(Bars, series), _of(Rule, series)
    if cursor is not None:
        rules.append(Rule(cursor, style=CURSOR))
    x = x_axis.fitted((x for x, _ in _values(lines, points)), margin=bool(points))
    ends = _ends(lines, x)
    right = _room_of_labels(ends, width)
    top = int(bool(y_axis.title and y_axis.shown and height > 1))
    bottom = int(x_axis.shown and height > NO_X_AXIS)
    rows = max(height - top - bottom, 1)
    # a stray line counts only where all are
    heights = [y for _, y in _values([line for line in lines if not line.stray] or lines, points)]
    left, y_ticks = 0, list[tuple[float, str]]()
    for _ in range(1 + bool(bars)):  # bars are as many as the labels leave columns
        tops = _tops(bars, max(width - left - right, 1))
        y = y_axis.fitted([*heights, *tops], margin=not bars)
        if y_axis.shown and width > NO_Y_AXIS:
            y_ticks = y.ticks(max(rows // ROWS_PER_TICK, 3))
            left = max((cell_len(label) for _, label in y_ticks), default=-1) + 1
    x_title = f"  {x_axis.title} →" if x_axis.title and bottom else ""
    y_title = f"{' ' * left}↑ {y_axis.title}" if top else ""
    # beside the other title, or in a row of its own below
    is_apart = x_title != "" and cell_len(x_title + y_title) > width * top
    rows = max(rows - is_apart, 1)

    whole = Canvas(width, height)
    whole.write(0, 0, y_title, TICK)
    whole.write(max(width - cell_len(x_title), 0), (height - 1) * is_apart, x_title, TICK)
    canvas = whole.part(left, top, max(width - left - right, 1), rows)
    area = _Area(canvas, x, y, bool(points))
    area.grid(whole, y_ticks)
    if bottom:
        area.below(whole, rules)
    for rule in rules:
        area.level(rule.y, LEVEL, rule.style)
    for each in bars:
        area.bars(each)
    for line in lines:
        area.band(line)
    for rule in rules:
        area.rule(rule)
    for line in lines:
        area.dots(line.points, line.style, line.bold)
    for number, line in enumerate(lines):
        area.marks(line)
        if signs:
            area.signs(line, number)
    if right:
        area.write_ends(whole, ends, right)
    area.points(points)
    return Drawing(whole.rows(), x, y, left, canvas.width)


def _of(kind: type[S], series: Iterable[object]) -> list[S]:
    return [each for each in series if isinstance(each, kind)]


def _values(lines: Iterable[Line], points: Iterable[Point]) -> list[XY]:
    """What the axes must hold."""
    found = [(point.x, point.y) for point in points]
    for line in lines:
        found += [*line.points, *line.marks]
    return found


def _tops(bars: Iterable[Bars], width: int) -> Iterator[float]:
    for each in bars:
        yield 0.0
        yield from (value for value, _ in each.columns(width))


def _ends(lines: Iterable[Line], x: Scale) -> list[tuple[XY, Line]]:
    """The last visible point of each line that has a label."""
    found = []
    for line in lines:
        points = (*line.marks, *line.points) if line.label or line.sign else ()
        inside = [point for point in points if x.low <= point[0] <= x.high]
        found += [(point, line) for point in inside[-1:]]
    return found


def _room_of_labels(ends: Sequence[tuple[XY, Line]], width: int) -> int:
    widest = max((cell_len(f"{e.sign} {e.label} {e.value}") + 1 for _, e in ends), default=0)
    room = min(widest, int(width * MAX_LABELS))
    return room if room >= MIN_LABEL else 0


@dataclass(frozen=True)
class _Area:
    """The part of the canvas in which series are drawn. Places are in cells from its top left, and
    NaN for what has none.
    """

    canvas: Canvas
    x: Scale
    y: Scale
    has_points: bool

    def _cells(self, share: float, size: int, edge: int) -> float:
        if not abs(share) < 1e6:
            return nan
        if self.has_points:  # a sign is in the middle of its cell, and the last is in the area
            return edge + 0.5 + share * (size - 1 - 2 * edge)
        # A hair less than the area, so that the last x is in it.
        return share * (size - 1e-6)

    def _across(self, x: float) -> float:
        width = self.canvas.width
        # a sign at the edge reads as a part of it
        return self._cells(self.x.share(x), width, INSET if width > 10 * INSET else 0)

    def _down(self, y: float) -> float:
        return self._cells(1 - self.y.share(y), self.canvas.height, 0)

    def _place(self, point: XY) -> XY:
        return self._across(point[0]), self._down(point[1])

    def _places(self, points: Iterable[XY]) -> list[XY]:
        return [place for place in map(self._place, points) if isfinite(sum(place))]

    def grid(self, whole: Canvas, ticks: Sequence[tuple[float, str]]) -> None:
        for value, label in reversed(ticks):
            self.level(value, GRID, FAINT)
            down = self._down(value)
            if 0 <= down < self.canvas.height:
                label = label.rjust(self.canvas.left - 1)
                whole.write(0, self.canvas.top + int(down), label, TICK)

    def level(self, y: float, char: str, style: str) -> None:
        """A line across."""
        row = self._down(y)
        for column in range(self.canvas.width):
            self.canvas.put(column, row, char, style)

    def rule(self, rule: Rule) -> None:
        column = self._across(rule.x)
        for row in range(self.canvas.height):
            self.canvas.put(column, row, RULE, rule.style)

    def below(self, whole: Canvas, rules: Sequence[Rule]) -> None:
        """The row below: the labels of rules, then the ticks that have room."""
        left, y = self.canvas.left, self.canvas.top + self.canvas.height
        for rule in rules:
            across = self._across(rule.x)
            if rule.label and not isnan(across):
                start, choices = left + int(across), list[tuple[int, int, str]]()
                for label in (rule.label, rule.label.split()[-1]):
                    before = f"{label} {MARK}"
                    choices.append((start - cell_len(before) + 1, y, before))
                    choices.append((start, y, f"{MARK} {label}"))
                whole.write_free([*choices, (start, y, MARK)], rule.style)
        for value, label in self.x.ticks(max(self.canvas.width // CELLS_PER_TICK, 2)):
            across, wide = self._across(value), cell_len(label)
            if 0 <= across <= self.canvas.width:
                start = min(max(left + int(across) - wide // 2, 0), whole.width - wide)
                whole.write_free([(start, y, label)], TICK)

    def bars(self, bars: Bars) -> None:
        width, height = self.canvas.width, self.canvas.height
        columns = bars.columns(width)[-width:]
        for x, (value, style) in enumerate(columns, width - len(columns)):
            share, eighths = self.y.share(value or nan), 0
            if not isnan(share):
                eighths = max(round(min(max(share, 0.0), 1.0) * 8 * height), 1)
            for row in range(ceil(eighths / 8)):
                part = EIGHTHS[min(eighths - 8 * row, 8)]
                self.canvas.put(x, height - 1 - row, part, style)

    def band(self, line: Line) -> None:
        edges = [(at, value) for at, low, high in line.band for value in (low, high)]
        self.dots(edges, line.band_style)

    def dots(self, points: Iterable[XY], style: str, bold: bool = False) -> None:
        """A line of dots."""
        for (x, y), char in self._braille(points, bold):
            self.canvas.put(x, y, char, style)

    def _braille(self, points: Iterable[XY], bold: bool) -> Iterable[tuple[tuple[int, int], str]]:
        width, height = self.canvas.width, self.canvas.height
        return braille(self._places(points), width, height, bold).items()

    def marks(self, line: Line) -> None:
        """× on single measurements that are not too close to the one before, on a line of dots; »
        where it is flat.
        """
        bold, before = f"bold {line.style}", -inf
        for (x, y), char in self._braille(line.marks, False):
            if x % 3 == 1:
                self.canvas.put(x, y, char, line.style)
        for across, down in self._places(line.marks):
            if across - before >= MARK_EVERY:
                self.canvas.put(across, down, EVALUATED, bold)
                before = across
        if line.flat:
            self.canvas.put(*self._place(line.flat), FLAT, bold)

    def signs(self, line: Line, number: int) -> None:
        """The sign along the line, at other columns than those of the other lines."""
        points = self._places(line.points) if line.sign else []
        first = int(SIGN_EVERY * ((number * PHASE + 0.3) % 1))
        for wanted in range(first, self.canvas.width, SIGN_EVERY):
            if points and points[0][0] <= wanted <= points[-1][0]:
                nearest = min(points, key=lambda point: abs(point[0] - wanted))
                self.canvas.put(*nearest, line.sign, f"bold {line.style}")

    def write_ends(self, whole: Canvas, ends: Sequence[tuple[XY, Line]], room: int) -> None:
        """Sign, label and value of each line beside its end, in a row each: as close to its own as
        the others allow. Where rows do not suffice the last lines' stay.
        """
        height, row = self.canvas.height, -1
        places = [(max(0.0, self._down(point[1])), line) for point, line in ends[-height:]]
        places.sort(key=lambda place: place[0])
        for number, (down, line) in enumerate(places):
            last = height - len(places) + number
            row = min(max(int(min(down, height)), row + 1), last)
            width = max(room - 2 - cell_len(line.value), 1)
            name = pad_or_truncate(f"{line.sign} {line.label}".strip(), width)
            style = f"bold {line.style}" if line.bold else line.style
            start = whole.width - room + 1
            whole.write(start, self.canvas.top + row, f"{name} {line.value}", style)

    def points(self, points: Sequence[Point]) -> None:
        """Signs, then labels, then intervals where they leave room. Those in the same cell share
        the first one's sign, and a label.
        """
        cells: dict[tuple[int, int], list[Point]] = {}
        for point in points:
            x, y = self._place((point.x, point.y))
            if 0 <= x < self.canvas.width and 0 <= y < self.canvas.height:
                cells.setdefault((int(x), int(y)), []).append(point)
        for (x, y), (first, *_) in cells.items():
            self.canvas.write(x, y, first.sign, first.style)
        for (x, y), shared in cells.items():
            label = ", ".join(point.label for point in shared if point.label)
            style = f"{shared[0].style} reverse" if shared[0].pointed else shared[0].style
            self.canvas.write_free(_beside(x, y, label), style)
        for (x, y), shared in cells.items():
            for point in shared:
                self._intervals(x, y, point)

    def _intervals(self, x: int, y: int, point: Point) -> None:
        style = f"{point.style} dim"
        across = [x, *map(self._across, point.x_range or ())]
        for column in _between(across, self.canvas.width):
            self.canvas.write_free([(column, y, "─")], style, margin=0)
        down = [y, *map(self._down, point.y_range or ())]
        for row in _between(down, self.canvas.height):
            self.canvas.write_free([(x, row, "│")], style, margin=0)


def _between(ends: Iterable[float], size: int) -> range:
    """The cells from the least to the greatest that has a place."""
    known = [int(end) for end in ends if not isnan(end)]
    return range(max(min(known), 0), min(max(known) + 1, size))


def _beside(x: int, y: int, label: str) -> Iterator[tuple[int, int, str]]:
    """Right of a point, left of it, then in the rows around it."""
    wide = cell_len(label)
    for start in (x + 2, x - 1 - wide):
        yield start, y, label
    for away in AROUND:
        for start in (x + 1, x - wide // 2, x - wide):
            yield start, y + away, label
