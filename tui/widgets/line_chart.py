"""A chart of one metric of several runs: smoothed lines over dim bands of raw values. Wraps textual-plot."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import floor, isfinite, log10
from typing import Any

from textual.app import ComposeResult
from textual.color import Color
from textual.containers import Grid
from textual.events import Click, MouseDown
from textual.message import Message
from textual.strip import Strip
from textual.widget import Widget
from textual.widgets import Static
from textual_hires_canvas import Canvas, HiResMode
from textual_plot import PlotWidget
from textual_plot.axis_formatter import AxisFormatter
from textual_plot.plot_widget import Legend

from tui.widgets.colors import readable

SIGN_EVERY = 18  # cells between two symbols on a line
PHASE = 0.37  # of SIGN_EVERY between two curves' symbols: those of eight curves stay at least a tenth apart
BAND, DIM = 0.4, 0.55  # share of the curve's colour in its band and in a dim line; the rest is background
FLAT = "»"  # marks the point from which a line is flat
HELD_OUT, HELD_OUT_EVERY = "×", 3  # marks an evaluation on a dashed line; minimum cells between two marks


# What a chart draws, as plain numbers

Range = tuple[float, float]


@dataclass(frozen=True)
class Column:
    """The steps in one column of the chart: x, minimum and maximum of the raw values, mean of the smoothed ones."""

    x: float
    low: float
    high: float
    mean: float


@dataclass(frozen=True)
class Curve:
    """A run's columns, its colour as #rrggbb, its symbol, the step at which it became flat, and its evaluations.

    A `dim` curve is drawn as a line only. A `stray` (diverged) curve does not affect the y range.
    """

    columns: Sequence[Column]
    color: str
    sign: str
    flat: float | None = None
    held_out: Sequence[Column] = ()
    dim: bool = False
    stray: bool = False

    def flat_column(self) -> Column | None:
        """The column at which it became flat, if that is in view."""
        if self.flat is None or not self.columns or not self.columns[0].x <= self.flat <= self.columns[-1].x:
            return None
        return nearest(self.columns, self.flat)


@dataclass(frozen=True)
class View:
    """The visible range of steps `x` and of values `y` (None: fit to the curves), and the step of the cursor.

    With `log`, `y` is in exponents of ten.
    """

    x: Range
    y: Range | None = None
    log: bool = False
    cursor: float | None = None


def power_of_ten(exponent: float) -> float:
    """10^exponent, clamped to the range of a float."""
    return float(10 ** min(max(exponent, -307.0), 308.0))


def to_log10(curve: Curve) -> Curve:
    """The curve with log10 of its values. Where `low` or `mean` is not positive, the next higher value is used."""

    def logarithms(columns: Sequence[Column]) -> list[Column]:
        exponents = []
        for column in columns:
            if column.high > 0:
                high = log10(column.high)
                mean = log10(column.mean) if column.mean > 0 else high
                low = log10(column.low) if column.low > 0 else min(mean, high)
                exponents.append(Column(column.x, low, high, mean))
        return exponents

    return replace(curve, columns=logarithms(curve.columns), held_out=logarithms(curve.held_out))


def range_of(curves: Iterable[Curve]) -> Range:
    """The y range of all curves with a small margin; (0, 1) if there are no values."""
    every = list(curves)
    decisive = [curve for curve in every if not curve.stray] or every
    columns = [column for curve in decisive for column in (*curve.columns, *curve.held_out)]
    values = [value for c in columns for value in (c.low, c.high, c.mean) if isfinite(value)]
    if not values:
        return 0.0, 1.0
    low, high = min(values), max(values)
    spread = high - low if high - low > 1e-9 * max(abs(low), abs(high)) else 0.0  # a smaller one is a rounding error
    margin = spread * 0.04 or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def is_drawable(range_: Range) -> bool:
    """Whether a chart can draw it: wider than a rounding error, and finite when multiplied by a number of cells."""
    low, high = range_
    return isfinite((high - low) * 1e6) and high - low > 1e-9 * max(abs(low), abs(high))


def nearest(columns: Sequence[Column], x: float) -> Column:
    return min(columns, key=lambda column: abs(column.x - x))


# The chart


class _Ticks(AxisFormatter):  # type: ignore[misc]  # textual-plot is not type-checked here
    """Ticks at 1, 2 or 5 times a power of ten; on a logarithmic axis, values are exponents of ten."""

    def __init__(self, log: bool = False, rows: int = 8) -> None:
        self.log, self.rows = log, max(rows, 2)

    def get_ticks(self, min_: float, max_: float, max_ticks: int = 8) -> list[float]:
        if self.log and max_ - min_ > 0.5:  # a narrower range is clearer with equal steps of the exponent
            factors = (1, 2, 5) if 3 * (max_ - min_) < self.rows else (1,)
            ticks = [power + log10(factor) for power in range(floor(min_), floor(max_) + 1) for factor in factors]
        else:
            step = nice_tick_step((max_ - min_) / min(5, self.rows))
            first = floor(min_ / step)
            ticks = [step * (first + i) for i in range(max_ticks + 4)]
        ticks = [tick for tick in ticks if min_ <= tick <= max_]
        return ticks[:: 1 + len(ticks) // (self.rows + 1)]

    def get_labels_for_ticks(self, ticks: Sequence[float]) -> list[str]:
        values = [power_of_ten(tick) if self.log else tick for tick in ticks]
        return [f"{v:,.0f}" if v == round(v) and abs(v) < 1e7 else f"{v:.4g}" for v in values]


def nice_tick_step(step: float) -> float:
    """The smallest of 1, 2 or 5 times a power of ten that is at least `step`."""
    power = 10.0 ** floor(log10(step))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step * (1 - 1e-9))


class _Canvas(Canvas):
    """A canvas whose empty lines have a style: without one, Textual fails under NO_COLOR."""

    def render_line(self, y: int) -> Strip:
        strip: Strip = super().render_line(y)
        return strip if strip.cell_length else Strip.blank(self.size.width, self.rich_style)


class _Plot(PlotWidget):  # type: ignore[misc]
    """textual-plot's widget without focus, drawn in one refresh."""

    can_focus = False

    def compose(self) -> ComposeResult:
        with Grid():
            for part in ("margin-top", "margin-left", "plot", "margin-bottom"):
                yield _Canvas(1, 1, id=part)
        yield Legend(id="legend")

    def _render_plot(self) -> None:
        with self.query_one("#plot", Canvas).batch_refresh():
            super()._render_plot()

    def _render_line_plot(self, dataset: Any) -> None:
        """Like the original, but for lines sorted by x, and ten times as fast.

        A line without a hires mode is dashed.
        """
        canvas, frame = self.query_one("#plot", Canvas), self._scale_rectangle
        left, across = self._x_min, frame.width / (self._x_max - self._x_min)
        top, down = self._y_max, frame.height / (self._y_max - self._y_min)
        points = zip(dataset.x.tolist(), dataset.y.tolist(), strict=True)
        inside = [((x - left) * across, (top - y) * down) for x, y in points]
        dashed = dataset.hires_mode is None
        for (x, y), char in braille(inside, frame.width, frame.height).items():
            if dashed and x % 3 == 2:
                continue
            canvas.set_pixel(x + frame.x, y + frame.y, char, dataset.line_style)


class LossChart(Widget, can_focus=True):
    """Draws curves; posts where the user zooms, pans and clicks."""

    DEFAULT_CSS = """
    LossChart { height: 1fr; }
    LossChart > Static { height: 1; padding: 0 1; color: $text-muted; }
    LossChart > _Plot { height: 1fr; }
    LossChart > _Plot > .plot--axis { color: $panel-lighten-2; }
    LossChart > _Plot > .plot--tick, LossChart > _Plot > .plot--label { color: $text-muted; text-style: none; }
    LossChart:focus > _Plot > .plot--axis { color: $primary; }
    """

    @dataclass
    class Moved(Message):
        """The user zoomed or panned to these ranges."""

        chart: "LossChart"
        x: Range
        y: Range

    @dataclass
    class Clicked(Message):
        """The user clicked at this step."""

        step: float

    class Resized(Message):
        """The number of columns changed, so the curves must be reduced again."""

    def __init__(self, title: str, id: str) -> None:
        super().__init__(id=id)
        self.title = title
        self.shown = View((0, 1), (0, 1))
        self._shown_title = title
        self._pressed: tuple[int, int] | None = None

    def compose(self) -> ComposeResult:
        yield Static(self.title, markup=False)
        yield _Plot(invert_mouse_wheel=True)

    @property
    def _plot(self) -> Any:
        return self.query_one(_Plot)

    def on_mount(self) -> None:
        self._plot.margin_top, self._plot.margin_bottom = 0, 1

    @property
    def columns(self) -> int:
        """Horizontal resolution of a line: two points per cell."""
        return max(2 * (self.size.width - int(self._plot.margin_left) - 2), 2)

    def draw(self, curves: Sequence[Curve], view: View) -> None:
        """Draw `curves`; if view.y is None, the y range is fitted to them."""
        plot = self._plot
        with self.app.batch_update():
            plot.clear()
            curves = [to_log10(curve) for curve in curves] if view.log else curves
            y = view.y or range_of(curves)
            self.shown = View(view.x, y, view.log, view.cursor)
            plot.set_xlimits(*view.x)
            plot.set_ylimits(*y)
            plot.set_x_formatter(_Ticks())
            plot.set_y_formatter(_Ticks(view.log, (self.size.height - 4) // 2))
            background = self.background_colors[1]
            colors = [readable(Color.parse(curve.color), background) for curve in curves]
            for curve, color in zip(curves, colors, strict=True):
                if not curve.dim:
                    # From low to high in every column; where the columns are close, the line looks like a band. All
                    # bands come first, so that none covers another curve's line.
                    xs = [column.x for column in curve.columns for _ in range(2)]
                    ys = [value for column in curve.columns for value in (column.low, column.high)]
                    plot.plot(xs, ys, background.blend(color, BAND).hex, HiResMode.BRAILLE)
            for number, (curve, color) in enumerate(zip(curves, colors, strict=True)):
                if curve.dim:
                    self._trace(curve, background.blend(color, DIM).hex)
                    continue
                self._draw_line(curve, color.hex, number)
                self._draw_held_out(curve, color.hex, number)
            evaluated = any(curve.held_out for curve in curves)
            title = f"{self.title} · {HELD_OUT} on held-out examples" if evaluated else self.title
            if self._shown_title != title:
                self._shown_title = title
                self.query_one(Static).update(title)
            if view.cursor is not None:
                plot.add_v_line(view.cursor, self.app.theme_variables["foreground"])

    def _draw_line(self, curve: Curve, color: str, number: int) -> None:
        """The smoothed line, its symbols (at other positions for every curve), and the mark where it is flat."""
        if not curve.columns:
            return
        self._trace(curve, color)
        signs = self._evenly_spaced(curve.columns, 0.5 + number * PHASE) or [curve.columns[-1]]
        self._mark(signs, curve.sign, f"bold {color}")
        if flat := curve.flat_column():
            self._mark([flat], FLAT, f"bold reverse {color}")

    def _trace(self, curve: Curve, color: str) -> None:
        if curve.columns:
            self._plot.plot([c.x for c in curve.columns], [c.mean for c in curve.columns], color, HiResMode.BRAILLE)

    def _draw_held_out(self, curve: Curve, color: str, number: int) -> None:
        """A dashed line through the evaluations, a mark on each, and the run's symbol between them."""
        if not curve.held_out:
            return
        self._plot.plot([c.x for c in curve.held_out], [c.mean for c in curve.held_out], color)
        (left, right), marked = self.shown.x, list[Column]()
        cell = 2 * (right - left) / self.columns
        inside = [replace(column, x=min(column.x, right - cell / 2)) for column in curve.held_out]  # not on the frame
        for column in inside:
            if not marked or column.x - marked[-1].x >= HELD_OUT_EVERY * cell:
                marked.append(column)
        self._mark(marked, HELD_OUT, f"bold {color}")
        middles = [
            Column((a.x + b.x) / 2, y := (a.mean + b.mean) / 2, y, y) for a, b in pairwise(curve.held_out)
        ]  # of the dashed line, where no mark is
        self._mark(self._evenly_spaced(middles, number * PHASE), curve.sign, f"bold {color}")

    def _evenly_spaced(self, columns: Sequence[Column], phase: float) -> list[Column]:
        """The columns nearest to positions SIGN_EVERY cells apart, within the curve."""
        left, right = self.shown.x
        every = (right - left) * 2 * SIGN_EVERY / self.columns
        positions = [left + every * (i + phase % 1) for i in range(self.columns // (2 * SIGN_EVERY) + 1)]
        return [nearest(columns, x) for x in positions if columns and columns[0].x <= x <= columns[-1].x]

    def _mark(self, columns: Sequence[Column], sign: str, style: str) -> None:
        self._plot.scatter([c.x for c in columns], [c.mean for c in columns], sign, style)

    def zoom(self, x: float, y: float = 1.0) -> None:
        """Scale the ranges by `x` and `y`, about the cursor or the centre."""
        centre = self.shown.cursor if self.shown.cursor is not None else sum(self.shown.x) / 2
        self._post_move(_scaled(self.shown.x, centre, x), _scaled(self._y, sum(self._y) / 2, y))

    def pan(self, x: float, y: float = 0.0) -> None:
        """Shift the ranges right by `x` and up by `y`, as shares of the visible range."""
        self._post_move(_shifted(self.shown.x, x), _shifted(self._y, y))

    @property
    def _y(self) -> Range:
        assert self.shown.y is not None  # `draw` sets it
        return self.shown.y

    def _post_move(self, x: Range, y: Range) -> None:
        """Post the new ranges; one that cannot be drawn stays as it is."""
        self.post_message(self.Moved(self, x if is_drawable(x) else self.shown.x, y if is_drawable(y) else self._y))

    def on_plot_widget_scale_changed(self, event: Any) -> None:
        """The user zoomed or panned with the mouse."""
        event.stop()
        self._post_move((event.x_min, event.x_max), (event.y_min, event.y_max))

    def on_resize(self) -> None:
        self.post_message(self.Resized())

    def on_mouse_down(self, event: MouseDown) -> None:
        self._pressed = (event.screen_x, event.screen_y)

    def on_click(self, event: Click) -> None:
        """Post a click; the end of a drag is not one."""
        if self._pressed == (event.screen_x, event.screen_y):
            cell = event.screen_x - self.region.x - self._plot.margin_left - 1
            left, right = self.shown.x
            step = left + (right - left) * (cell + 0.5) / (self.columns / 2)
            if left <= step <= right:
                self.post_message(self.Clicked(step))


def _scaled(range_: Range, centre: float, factor: float) -> Range:
    low, high = (centre + (end - centre) * factor for end in range_)
    return low, high


def _shifted(range_: Range, part: float) -> Range:
    by = (range_[1] - range_[0]) * part
    return range_[0] + by, range_[1] + by


# Lines as braille dots, two across and four down per cell

ACROSS, DOWN = 2, 4
_DOTS = (
    (0x01, 0x02, 0x04, 0x40),
    (0x08, 0x10, 0x20, 0x80),
)  # Unicode bits of the left and right column of dots, from the top
_SPANS = [[[sum(half[top : end + 1]) for end in range(DOWN)] for top in range(DOWN)] for half in _DOTS]


def braille(points: Sequence[tuple[float, float]], width: int, height: int) -> dict[tuple[int, int], str]:
    """Characters that draw the line through `points` on a grid of `width` × `height` cells, by cell (x, y).

    Points are in cells from the top left, sorted by x: as x never decreases, a column of dots is one span from the
    lowest to the highest, which is ten times as fast as a line of dots between each two points. What lies outside the
    grid is clipped.
    """
    spans: dict[int, tuple[int, int]] = {}  # column of dots → smallest and largest y of the line in it, in dots

    def add(column: int, y: int) -> None:
        low, high = spans.get(column, (y, y))
        spans[column] = (y if y < low else low, y if y > high else high)

    columns, before = width * ACROSS, None
    for x, y in points:
        x, y = x * ACROSS, y * DOWN
        column = floor(x)
        if before is not None and (last := floor(before[0])) != column:
            dx, dy = x - before[0], y - before[1]
            for edge in range(max(last + 1, 0), min(column, columns) + 1):
                if 0 < edge < columns:  # the dots where the line crosses from one column to the next
                    crossing = floor(before[1] + dy * ((edge - before[0]) / dx))  # not dy / dx, which can be infinite
                    add(edge - 1, crossing)
                    add(edge, crossing)
        if 0 <= column < columns:
            add(column, floor(y))
        before = (x, y)
    bits: dict[tuple[int, int], int] = {}
    bottom = height * DOWN - 1
    for column, (low, high) in spans.items():
        if low > bottom or high < 0:
            continue
        top, end = max(low, 0), min(high, bottom)
        parts, x = _SPANS[column % ACROSS], column // ACROSS
        first, last = top // DOWN, end // DOWN
        for y in range(first, last + 1):
            part = parts[top % DOWN if y == first else 0][end % DOWN if y == last else DOWN - 1]
            bits[x, y] = bits.get((x, y), 0) | part
    return {cell: chr(0x2800 | dots) for cell, dots in bits.items()}
