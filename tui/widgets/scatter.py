"""A scatter in cells: a sign for each point, its label beside it, light axes. Labels never overlap signs or labels."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import floor, log10

from rich.cells import cell_len
from rich.style import Style
from rich.text import Text

from tui.widgets.text import pad_or_truncate

DECADE = 8.0  # from this ratio of largest to smallest value on, an axis is logarithmic
INSET = 2  # cells between the frame and the first and the last value
NEAR = 3  # rows that a label may be away from its point
Range = tuple[float, float]


@dataclass(frozen=True)
class Point:
    """`x_range`, `y_range`: the interval of a value, drawn as a bar. `label` may be empty."""

    x: float
    y: float
    sign: str
    label: str = ""
    style: Style = field(default_factory=Style)
    x_range: Range | None = None
    y_range: Range | None = None


@dataclass(frozen=True)
class Axis:
    """A quantity: its title, how a value is written. `falls`: the smallest is drawn where the largest would be.

    `low`, `high`: the range drawn. `whole`: ticks at these values alone, as of ranks that were tried.
    """

    title: str
    low: float
    high: float
    format: Callable[[float], str] = "{:.4g}".format
    falls: bool = False
    log: bool = False
    whole: Sequence[float] = ()

    @classmethod
    def around(cls, title: str, values: Sequence[float], share: bool = False, **options: object) -> "Axis":
        """The axis that has room for all values: of shares in steps of a tenth, of others with a margin."""
        low, high = min(values, default=0.0), max(values, default=1.0)
        if share:
            low, high = min(floor(low * 10) / 10, 0.9), 1.0
            return cls(title, low, high, lambda value: f"{value:.0%}", **options)  # type: ignore[arg-type]
        log = low > 0 and high / low >= DECADE
        margin = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        ends = (low / (high / low) ** 0.06, high * (high / low) ** 0.06) if log else (low - margin, high + margin)
        return cls(title, *ends, log=log, **options)  # type: ignore[arg-type]

    def cell(self, value: float, cells: int) -> int:
        """Where a value is drawn among `cells`, from the left or from below."""
        low, high, at = (log10(n) if self.log else n for n in (self.low, self.high, max(value, self._least)))
        share = (at - low) / (high - low)
        inset = INSET if cells > 10 * INSET else 0  # a sign on the frame would read as a part of it
        last = cells - 1 - 2 * inset
        return inset + min(max(round((1 - share if self.falls else share) * last), 0), last)

    @property
    def _least(self) -> float:
        return self.low if self.log else float("-inf")

    def ticks(self, most: int) -> list[float]:
        """At most `most` values to write at the axis."""
        if self.whole:
            return list(self.whole[:: -(-len(self.whole) // max(most, 1))])
        if self.log:
            powers = range(floor(log10(self.low)), floor(log10(self.high)) + 1)
            choices = [
                [10.0**power * factor for power in powers for factor in factors] for factors in ((1, 2, 5), (1,))
            ]
        else:
            step = _nice((self.high - self.low) / max(most, 1))
            steps = (step, _nice(step * 1.01), _nice(step * 3))
            choices = [[(floor(self.low / wide) + n) * wide for n in range(most + 3)] for wide in steps]
        slack = (self.high - self.low) * 1e-9
        inside = [[at for at in values if self.low - slack <= at <= self.high + slack] for values in choices]
        return next((values for values in inside if len(values) <= most), inside[-1][:most])


def _nice(step: float) -> float:
    """The smallest of 1, 2 or 5 times a power of ten that is at least `step`."""
    power = 10.0 ** floor(log10(step))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step * (1 - 1e-9))


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

    def line(self, y: int, empty: str, style: Style) -> Text:
        line = Text(no_wrap=True)
        for x in range(self.width):
            line.append(*self._cells.get((x, y), (empty, style)))
        return line


def draw(points: Sequence[Point], x: Axis, y: Axis, width: int, height: int, muted: Style) -> list[Text]:
    """The scatter in `height` lines of `width` cells. A label that has no room is left out.

    Points in the same cell share a sign, the first one's, and a label.
    """
    rows = height - 3  # y's title, x's line and its ticks
    marks = {y.cell(tick, rows): y.format(tick) for tick in y.ticks(min(6, rows // 2))} if rows > 2 else {}
    margin = max(map(len, marks.values()), default=0) + 1
    columns = width - margin - 1
    if rows < 3 or columns < 8:
        return [Text("too small to draw", muted, no_wrap=True)]
    grid = _Grid(columns, rows)
    cells: dict[tuple[int, int], list[Point]] = {}
    for point in points:
        cells.setdefault((x.cell(point.x, columns), rows - 1 - y.cell(point.y, rows)), []).append(point)
    for (at, row), (first, *others) in cells.items():
        grid.write(at, row, first.sign, first.style)
        labels = [point.label for point in (first, *others) if point.label]
        cells[at, row] = [Point(first.x, first.y, first.sign, ", ".join(labels), first.style)]
    for (at, row), (point,) in cells.items():
        _write_label(grid, at, row, point)
    for point in points:  # last: they give way to signs and labels
        _write_intervals(grid, point, x, y)
    lines = [Text(pad_or_truncate(f"{' ' * margin}↑ {y.title}", width), muted, no_wrap=True)]
    for row in range(rows):
        mark = marks.get(rows - 1 - row, "")
        line = Text(no_wrap=True).append(f"{mark:>{margin - 1}} {'┤' if mark else '│'}", muted)
        lines.append(line.append_text(grid.line(row, " ", muted)))
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
                grid.write(start, row + away, point.label, point.style)
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
    for tick in x.ticks(max(2, columns // 8)):
        at, text = x.cell(tick, columns), x.format(tick)
        start = min(max(at - len(text) // 2, 0), columns - len(text))
        if texts.free(start, 0, len(text)) and (start == 0 or texts.free(start - 1, 0, 1)):
            texts.write(start, 0, text, muted)
            line[at] = "┬"
    title = f" {pad_or_truncate(x.title, min(cell_len(x.title), columns - 5))} ─▶"
    yield Text(f"{' ' * margin}└{''.join(line)[: columns - cell_len(title)]}{title}", muted, no_wrap=True)
    yield Text(" " * (margin + 1), no_wrap=True).append_text(texts.line(0, " ", muted))
