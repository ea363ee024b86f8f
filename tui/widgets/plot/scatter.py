"""A scatter in cells: a sign for each point, its label beside it, light axes. Labels never overlap
signs or labels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from math import ceil, floor, log10

from rich.cells import cell_len
from rich.style import Style
from rich.text import Text

from tui.widgets.plot import scale
from tui.widgets.plot.scale import Range
from tui.widgets.text import pad_or_truncate

INSET = 2  # cells between the frame and the first and the last value
NEAR = 3  # rows that a label may be away from its point
SHARES = (0.1, 0.2, 0.25, 0.5, 1.0)  # steps of an axis in percent


@dataclass(frozen=True)
class Point:
    """`x_range`, `y_range`: the interval of a value, drawn as a bar. `label` may be empty."""

    x: float
    y: float
    sign: str
    label: str = ""
    style: Style = field(default_factory=Style)
    pointed: bool = False  # its label is in reverse
    x_range: Range | None = None
    y_range: Range | None = None


@dataclass(frozen=True)
class Axis:
    """A quantity. `falls`: less is better, and drawn where more of others would be. `range`: with
    `log`, of exponents.

    `marks`: the values that are written at the axis, with their labels, as of ranks that were
    tried; else it has ticks.
    """

    title: str
    range: Range
    falls: bool = False
    log: bool = False
    share: bool = False
    marks: Sequence[tuple[float, str]] = ()

    @classmethod
    def around(
        cls,
        title: str,
        values: Sequence[float],
        share: bool = False,
        falls: bool = False,
        marks: Sequence[tuple[float, str]] = (),
    ) -> "Axis":
        """The axis that has room for all values: of shares up to 100%; logarithmic where they span
        a decade.
        """
        if share:
            return cls(
                title, (min(floor(min(values, default=0.0) * 10) / 10, 0.9), 1.0), falls, share=True
            )
        log = scale.spans_decade(values)
        return cls(title, scale.fit(values, log), falls, log, marks=marks)

    def cell(self, value: float, cells: int) -> int:
        """Where a value is drawn among `cells`, from the left or from below."""
        low, high = self.range
        at = value
        if self.log:
            at = log10(value) if value > 0 else low
        share = (at - low) / (high - low)
        inset = INSET if cells > 10 * INSET else 0  # a sign on the frame would read as a part of it
        last = cells - 1 - 2 * inset
        return inset + min(max(round((1 - share if self.falls else share) * last), 0), last)

    def ticks(self, most: int) -> list[tuple[float, str]]:
        """At most `most` values to write at the axis, with their labels."""
        if self.marks:
            return list(self.marks[:: -(-len(self.marks) // max(most, 1))])
        low, high = self.range
        if self.share:
            step = next(
                (step for step in SHARES if floor((high - low) / step + 1e-9) < most), SHARES[-1]
            )
            first = ceil(low / step - 1e-9)
            values = [
                (first + n) * step for n in range(floor((high - first * step) / step + 1e-9) + 1)
            ]
            return [(value, f"{value:.0%}") for value in values]
        ticks = scale.ticks(self.range, most, self.log)
        return [(scale.power_of_ten(at) if self.log else at, label) for at, label in ticks]


class _Grid:
    """Cells that are written once; `free` says where there is room."""

    def __init__(self, width: int, height: int) -> None:
        self.width, self.height = width, height
        self._cells: dict[tuple[int, int], tuple[str, Style]] = {}

    def free(self, x: int, y: int, width: int) -> bool:
        inside = 0 <= y < self.height and x >= 0 and x + width <= self.width
        return inside and not any((at, y) in self._cells for at in range(x, x + width))

    def write(self, x: int, y: int, text: str, style: Style) -> None:
        for char in text:
            self._cells[x, y] = char, style
            if cell_len(char) > 1:
                self._cells[x + 1, y] = "", style
            x += max(cell_len(char), 1)

    def line(self, y: int) -> Text:
        """A row, with one span for neighbours of one style: Textual takes a millisecond for some
        thirty of them.
        """
        cells = (self._cells.get((x, y), (" ", None)) for x in range(self.width))
        line = Text(no_wrap=True)
        for style, run in groupby(cells, key=lambda cell: cell[1]):
            line.append("".join(text for text, _ in run), style)
        return line


def draw(
    points: Sequence[Point], x: Axis, y: Axis, width: int, height: int, muted: Style
) -> list[Text]:
    """The scatter in `height` lines of `width` cells. A label that has no room is left out.

    Points in the same cell share a sign, the first one's, and a label.
    """
    rows = height - 3  # y's title, x's line and its ticks
    marks = (
        {y.cell(at, rows): label for at, label in y.ticks(min(6, rows // 2))} if rows > 2 else {}
    )
    margin = max(map(len, marks.values()), default=0) + 1
    columns = width - margin - 1
    if rows < 3 or columns < 8:
        return [Text("too small to draw", muted, no_wrap=True)]
    grid = _Grid(columns, rows)
    cells: dict[tuple[int, int], list[Point]] = {}
    for point in points:
        cells.setdefault((x.cell(point.x, columns), rows - 1 - y.cell(point.y, rows)), []).append(
            point
        )
    for (at, row), (first, *others) in cells.items():
        grid.write(at, row, first.sign, first.style)
        labels = [point.label for point in (first, *others) if point.label]
        cells[at, row] = [replace(first, label=", ".join(labels))]
    for (at, row), (point,) in cells.items():
        _write_label(grid, at, row, point)
    for point in points:  # last: they give way to signs and labels
        _write_intervals(grid, point, x, y)
    lines = [Text(pad_or_truncate(f"{' ' * margin}↑ {y.title}", width), muted, no_wrap=True)]
    for row in range(rows):
        mark = marks.get(rows - 1 - row, "")
        line = Text(no_wrap=True).append(f"{mark:>{margin - 1}} {'┤' if mark else '│'}", muted)
        lines.append(line.append_text(grid.line(row)))
    return [*lines, *_bottom(x, margin, columns, muted)]


def _write_label(grid: _Grid, at: int, row: int, point: Point) -> None:
    """Right of the point, left of it, then in the rows around it."""
    wide = cell_len(point.label)
    if not wide:
        return
    for away in sorted(range(-NEAR, NEAR + 1), key=lambda away: (abs(away), away > 0)):
        beside = (at + 2, at - 1 - wide) if away == 0 else (at + 1, at - wide // 2, at - wide)
        for start in beside:
            # a cell on each side stays empty, so that two labels do not read as one
            if grid.free(start - (away != 0), row + away, wide + (away != 0)) and (
                start + wide == grid.width or grid.free(start + wide, row + away, 1) or away == 0
            ):
                grid.write(
                    start, row + away, point.label, point.style + Style(reverse=point.pointed)
                )
                return


def _write_intervals(grid: _Grid, point: Point, x: Axis, y: Axis) -> None:
    column, row = x.cell(point.x, grid.width), grid.height - 1 - y.cell(point.y, grid.height)
    style = point.style + Style(dim=True)
    if point.x_range:
        low, high = sorted(x.cell(end, grid.width) for end in point.x_range)
        for at in (at for at in range(low, high + 1) if grid.free(at, row, 1)):
            grid.write(at, row, "─", style)
    if point.y_range:
        low, high = sorted(grid.height - 1 - y.cell(end, grid.height) for end in point.y_range)
        for at in (at for at in range(low, high + 1) if grid.free(column, at, 1)):
            grid.write(column, at, "│", style)


def _bottom(x: Axis, margin: int, columns: int, muted: Style) -> Iterator[Text]:
    """x's line, in which its title stands, and its ticks."""
    line, texts = ["─"] * columns, _Grid(columns, 1)
    for value, text in x.ticks(max(2, columns // 8)):
        at = x.cell(value, columns)
        start = min(max(at - len(text) // 2, 0), columns - len(text))
        if texts.free(start, 0, len(text)) and (start == 0 or texts.free(start - 1, 0, 1)):
            texts.write(start, 0, text, muted)
            line[at] = "┬"
    title = f" {pad_or_truncate(x.title, min(cell_len(x.title), columns - 5))} ─▶"
    yield Text(
        f"{' ' * margin}└{''.join(line)[: columns - cell_len(title)]}{title}", muted, no_wrap=True
    )
    yield Text(" " * (margin + 1), no_wrap=True).append_text(texts.line(0))
