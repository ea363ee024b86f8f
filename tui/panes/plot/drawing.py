"""Draws series in cells: light axes, lines with their newest values beside their ends, points with
labels that never overlap, bars, rules.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import isnan
from typing import NamedTuple, TypeVar

from rich.cells import cell_len
from textual.content import Content

from tui.panes.plot.canvas import Canvas
from tui.panes.plot.raster import braille
from tui.panes.plot.series import XY, Axis, Bars, Line, Point, Rule, Scale, Series
from tui.widgets.cells import pad_or_truncate

EVALUATED, FLAT, GRID, RULE, MARK, UNKNOWN = "×", "»", "┈", "│", "▲", "·"
EIGHTHS = " ▁▂▃▄▅▆▇█"
ROWS_PER_TICK, CELLS_PER_TICK = 3, 10  # at least between two ticks
# of the width, for the labels at line ends; cells, or there are none
MAX_LABELS, MIN_LABEL = 0.4, 6
MARK_EVERY = 3  # cells between two marks, at least
# cells between two signs on a line; of it, from one line's to the next one's
SIGN_EVERY, PHASE = 18, 0.37
INSET = 2  # cells between the edge and the first and the last point
NEAR = 3  # rows that a label may be away from its point
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
    points, bars = _of(Point, series), _of(Bars, series)
    x = x_axis.fitted(_x_values(series), margin=bool(points))
    ends = list(_ends(_of(Line, series), x))
    right = _room_of_labels(ends, width)
    canvas = Canvas(width, height)
    lines, rules = _of(Line, series), _of(Rule, series)
    if cursor is not None:
        rules.append(Rule(cursor, style=CURSOR))
    top = int(bool(y_axis.title and y_axis.shown and height > 1))
    bottom = int(x_axis.shown and height > NO_X_AXIS)
    rows = max(height - top - bottom, 1)
    has_ticks = y_axis.shown and width > NO_Y_AXIS
    left, y_ticks = 0, list[tuple[float, str]]()
    for _ in range(1 + bool(bars)):  # bars are as many as the labels leave columns
        heights = _heights(bars, max(width - left - right, 1))
        y = y_axis.fitted([*_y_values(series), *heights], margin=not bars)
        y_ticks = y.ticks(max(rows // ROWS_PER_TICK, 3)) if has_ticks else []
        left = max((cell_len(label) for _, label in y_ticks), default=-1) + 1
    x_title = f"  {x_axis.title} →" if x_axis.title and bottom else ""
    y_title = f"{' ' * left}↑ {y_axis.title}" if top else ""
    start = max(width - cell_len(x_title), 0)
    # beside the other title, or in a row of its own below
    is_apart = x_title != "" and (not top or cell_len(y_title) > start)
    rows = max(rows - is_apart, 1)
    inset = INSET if points else 0
    area = _Area(canvas, x, y, left, top, max(width - left - right, 1), rows, inset)

    area.grid(y_ticks)
    canvas.write(0, 0, y_title, TICK)
    canvas.write(start, height - 1 if is_apart else 0, x_title, TICK)
    if bottom:
        area.below(rules)
    for rule in rules:
        area.level(rule)
    for each in bars:
        area.bars(each)
    for line in lines:
        area.band(line)
    for rule in rules:
        area.rule(rule)
    for line in lines:
        area.line(line)
    for number, line in enumerate(lines):
        area.marks(line, number if signs else None)
    if right:
        area.write_ends(ends, right)
    area.points(points)
    return Drawing(canvas.rows(), x, y, left, area.width)


def _of(kind: type[S], series: Iterable[object]) -> list[S]:
    return [each for each in series if isinstance(each, kind)]


def _x_values(series: Sequence[Series]) -> Iterator[float]:
    for line in _of(Line, series):
        for points in (line.points, line.marks):
            yield from (x for x, _ in (*points[:1], *points[-1:]))
    yield from (point.x for point in _of(Point, series))


def _y_values(series: Sequence[Series]) -> Iterator[float]:
    """What the range of y must hold; a stray line counts only where all are."""
    lines = _of(Line, series)
    for line in [line for line in lines if not line.stray] or lines:
        yield from (y for _, y in line.points)
        yield from (y for _, y in line.marks)
    yield from (point.y for point in _of(Point, series))


def _heights(bars: Iterable[Bars], width: int) -> Iterator[float]:
    for each in bars:
        yield 0.0
        yield from (value for value, _ in each.columns(width) if value is not None)


def _ends(lines: Iterable[Line], x: Scale) -> Iterator[tuple[XY, Line]]:
    """The last visible point of each line that has a label."""
    for line in lines:
        if not line.quiet and (line.label or line.sign):
            every = (point for points in (line.points, line.marks) for point in reversed(points))
            inside = (point for point in every if x.low <= point[0] <= x.high)
            if end := next(inside, None):
                yield end, line


def _room_of_labels(ends: Sequence[tuple[XY, Line]], width: int) -> int:
    widest = max((cell_len(f"{e.sign} {e.label} {e.value}") + 1 for _, e in ends), default=0)
    room = min(widest, int(width * MAX_LABELS))
    return room if room >= MIN_LABEL else 0


@dataclass(frozen=True)
class _Area:
    """The part of the canvas in which series are drawn; positions are in cells from its top left."""

    canvas: Canvas
    x: Scale
    y: Scale
    left: int
    top: int
    width: int
    height: int
    inset: int

    def _across(self, x: float) -> float | None:
        """The column of an x, in cells; None if it has no place on the scale."""
        share = self.x.share(x)
        if share is None or not abs(share) < 1e6:
            return None
        if self.inset:  # a sign at the edge reads as a part of it
            edge = self.inset if self.width > 10 * self.inset else 0
            return edge + share * (self.width - 1 - 2 * edge)
        # A hair less than the area, so that the last x is in it.
        return share * (self.width - 1e-6)

    def _down(self, y: float) -> float | None:
        """The row of a y, in cells; None if it has no place on the scale."""
        share = self.y.share(y)
        if share is None or not abs(share) < 1e6:
            return None
        return (1 - share) * (self.height - 1 if self.inset else self.height - 1e-6)

    def _place(self, point: XY) -> XY | None:
        """Where a point is, in cells."""
        across, down = self._across(point[0]), self._down(point[1])
        return None if across is None or down is None else (across, down)

    def _places(self, points: Iterable[XY]) -> list[XY]:
        return [place for point in points if (place := self._place(point))]

    def _put(self, x: float, y: float, char: str, style: str) -> None:
        if 0 <= x < self.width and 0 <= y < self.height:
            self.canvas.put(self.left + int(x), self.top + int(y), char, style)

    def grid(self, ticks: Iterable[tuple[float, str]]) -> None:
        for value, label in ticks:
            down = self._down(value)
            row = self.top + (self._cell(down) if down is not None else -1)
            if self.top <= row < self.top + self.height:
                self.canvas.write(self.left, row, GRID * self.width, FAINT)
                self.canvas.write(0, row, label.rjust(self.left - 1), TICK)

    def _cell(self, at: float) -> int:
        """Signs are in the middle of cells, dots at their edges."""
        return round(at) if self.inset else int(at)

    def below(self, rules: Sequence[Rule]) -> None:
        """The row below: the labels of rules, then the ticks that have room."""
        row = Canvas(self.canvas.width, 1)
        y = self.top + self.height
        for rule in rules:
            across = None if rule.x is None else self._across(rule.x)
            if across is not None and rule.label:
                start, choices = self.left + int(across), list[tuple[int, str]]()
                for label in (rule.label, rule.label.split()[-1]):
                    right, left = f"{MARK} {label}", f"{label} {MARK}"
                    sides = [(start - cell_len(left) + 1, left), (start, right)]
                    # the first tick has a short label, the last one mostly a long one
                    choices += sides if across > cell_len(left) else sides[::-1]
                self._write_free(row, y, [*choices, (start, MARK)], rule.style)
        for value, label in self.x.ticks(max(self.width // CELLS_PER_TICK, 2)):
            across = self._across(value)
            if across is not None and 0 <= across <= self.width:
                start = self.left + self._cell(across) - cell_len(label) // 2
                start = min(max(start, 0), self.canvas.width - cell_len(label))
                self._write_free(row, y, [(start, label)], TICK)

    def _write_free(
        self, row: Canvas, y: int, choices: Iterable[tuple[int, str]], style: str
    ) -> None:
        """Write the first of the texts below the area that has room where it is to begin."""
        for x, text in choices:
            if x >= 0 and row.free(max(x - 1, 0), 0, cell_len(text) + (x > 0)):
                row.write(x, 0, text, style)
                self.canvas.write(x, y, text, style)
                return

    def bars(self, bars: Bars) -> None:
        columns = bars.columns(self.width)[-self.width :]
        for x, (value, style) in enumerate(columns, self.width - len(columns)):
            share = self.y.share(value) if value else None
            if value is None and self.canvas.free(self.left + x, self.top + self.height - 1, 1):
                self._put(x, self.height - 1, UNKNOWN, FAINT)
            if share is None or isnan(share):
                continue
            eighths = max(round(min(max(share, 0.0), 1.0) * 8 * self.height), 1)
            for row in range(self.height):
                part = min(max(eighths - 8 * row, 0), 8)
                if part:
                    self._put(x, self.height - 1 - row, EIGHTHS[part], style)

    def band(self, line: Line) -> None:
        edges = [(at, value) for at, low, high in line.band for value in (low, high)]
        self._dots(self._places(edges), line.band_style, False)

    def rule(self, rule: Rule) -> None:
        across = None if rule.x is None else self._across(rule.x)
        if across is not None:
            for row in range(self.height):
                self._put(across, row, RULE, rule.style or FAINT)

    def level(self, rule: Rule) -> None:
        down = None if rule.y is None else self._down(rule.y)
        if down is not None:
            label = pad_or_truncate(rule.label, min(cell_len(rule.label), self.width - 1))
            for start, text in ((0, "╌" * self.width), (1, label)):
                self.canvas.write(
                    self.left + start, self.top + int(down), text, rule.style or FAINT
                )

    def line(self, line: Line) -> None:
        self._dots(self._places(line.points), line.style, line.bold)

    def _dots(self, places: Sequence[XY], style: str, bold: bool) -> None:
        for (x, y), char in braille(places, self.width, self.height, bold).items():
            self._put(x, y, char, style)

    def marks(self, line: Line, number: int | None) -> None:
        """× on single measurements that are not too close to the one before, on a line of dots; »
        where it is flat; with a number, signs at other columns than those of the other lines.
        """
        bold, places = f"bold {line.style}", self._places(line.marks)
        for (x, y), char in braille(places, self.width, self.height).items():
            if x % 3 == 1:
                self._put(x, y, char, line.style)
        before = -float(MARK_EVERY)
        for across, down in places:
            if across - before >= MARK_EVERY:
                self._put(across, down, EVALUATED, bold)
                before = across
        if number is not None and line.sign and not line.quiet and line.points:
            points = self._places(line.points)
            for turn in range(self.width // SIGN_EVERY + 1):
                wanted = SIGN_EVERY * (turn + (number * PHASE + 0.3) % 1)
                if points and points[0][0] <= wanted <= points[-1][0]:
                    nearest = min(points, key=lambda point: abs(point[0] - wanted))
                    self._put(*nearest, line.sign, bold)
        if line.flat and (place := self._place(line.flat)):
            self._put(*place, FLAT, bold)

    def write_ends(self, ends: Sequence[tuple[XY, Line]], room: int) -> None:
        """Sign, label and value of each line beside its end, in a row each."""
        places = [(self._place(point) or (0.0, 0.0), line) for point, line in ends]
        wanted = [(place[1], line) for place, line in places]
        for row, line in _spread(wanted, self.height):
            width = room - 2 - cell_len(line.value)
            name = ""
            if width > 0:
                name = pad_or_truncate(f"{line.sign} {line.label}".strip(), width)
            style = f"bold {line.style}" if line.bold else line.style
            start = self.canvas.width - room + 1
            self.canvas.write(start, self.top + row, f"{name} {line.value}", style)

    def points(self, points: Sequence[Point]) -> None:
        """Signs, then labels, then intervals where they leave room. Those in the same cell share
        the first one's sign, and a label.
        """
        written = Canvas(self.width, self.height)
        cells: dict[tuple[int, int], list[Point]] = {}
        for point in points:
            x, y = self._place((point.x, point.y)) or (-1.0, -1.0)
            if written.free(round(x), round(y), 1):  # in the area
                cells.setdefault((round(x), round(y)), []).append(point)
        for (x, y), (first, *_) in cells.items():
            self._write_point(written, x, y, first.sign, first.style)
        for (x, y), shared in cells.items():
            label = ", ".join(point.label for point in shared if point.label)
            if label:
                self._write_label(written, x, y, label, shared[0])
        for point in points:
            self._write_intervals(written, point)

    def _write_point(self, written: Canvas, x: int, y: int, text: str, style: str) -> None:
        written.write(x, y, text, style)
        self.canvas.write(self.left + x, self.top + y, text, style)

    def _write_label(self, written: Canvas, x: int, y: int, label: str, point: Point) -> None:
        """Right of the point, left of it, then in the rows around it."""
        wide, style = cell_len(label), f"{point.style} reverse" if point.pointed else point.style
        for away in sorted(range(-NEAR, NEAR + 1), key=lambda away: (abs(away), away > 0)):
            beside = (x + 1, x - wide // 2, x - wide) if away else (x + 2, x - 1 - wide)
            for start in beside:
                # a cell on each side stays empty, so that two labels do not read as one
                if written.free(start, y + away, wide, 1):
                    self._write_point(written, start, y + away, label, style)
                    return

    def _write_intervals(self, written: Canvas, point: Point) -> None:
        place, style = self._place((point.x, point.y)), f"{point.style} dim"
        if place is None:
            return
        column, row = round(place[0]), round(place[1])
        for values, across in ((point.x_range, True), (point.y_range, False)):
            if values is None:
                continue
            ends = [(end, point.y) if across else (point.x, end) for end in values]
            reached = [end[not across] for end in (place, *self._places(ends))]
            size = self.width if across else self.height
            for at in range(max(round(min(reached)), 0), min(round(max(reached)) + 1, size)):
                x, y = (at, row) if across else (column, at)
                if written.free(x, y, 1):
                    self._write_point(written, x, y, "─" if across else "│", style)


def _spread(wanted: list[tuple[float, S]], rows: int) -> list[tuple[int, S]]:
    """A row for each label, as close to its own as the others allow; where rows do not suffice the
    last lines' stay.
    """
    wanted = sorted(wanted[-rows:], key=lambda end: end[0])
    at: list[int] = []
    for number, (row, _) in enumerate(wanted):
        first, last = (at[-1] + 1 if at else 0), rows - len(wanted) + number
        at.append(min(max(int(min(row, rows)), first), last))
    return [(row, line) for row, (_, line) in zip(at, wanted, strict=True)]
