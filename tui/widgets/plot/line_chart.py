"""A chart of one quantity of several runs: smoothed lines over dim raw bands. The one place that knows textual-plot."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import floor, log10
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

from tui.widgets.contrast import readable
from tui.widgets.plot.braille import cells
from tui.widgets.plot.curve import (
    Column,
    Curve,
    Range,
    View,
    between,
    in_powers,
    nearest,
    possible,
    power_of_ten,
    range_of,
    scaled,
    shifted,
)

SIGN_EVERY = 18  # cells between two signs on a line
BAND, DIM = 0.4, 0.55  # of a line's colour in its raw band, and in a dim line
FLAT = "»"  # stands on a line where it becomes flat
HELD_OUT, HELD_OUT_EVERY = "×", 3  # stands at an evaluation, on a dashed line; least cells between two


class _Ticks(AxisFormatter):  # type: ignore[misc]  # textual-plot is not type-checked here
    """1, 2 or 5 times a power of ten; on a logarithmic axis, values are exponents of ten."""

    def __init__(self, log: bool = False, room: int = 8) -> None:
        self.log, self.room = log, max(room, 2)

    def get_ticks(self, min_: float, max_: float, max_ticks: int = 8) -> list[float]:
        if self.log and max_ - min_ > 0.5:  # within a narrower range, equal steps of the exponent are told apart better
            factors = (1, 2, 5) if 3 * (max_ - min_) < self.room else (1,)
            ticks = [power + log10(factor) for power in range(floor(min_), floor(max_) + 1) for factor in factors]
        else:
            step = nice_tick_step((max_ - min_) / min(5, self.room))
            first = floor(min_ / step)
            ticks = [step * (first + i) for i in range(max_ticks + 4)]
        ticks = [tick for tick in ticks if min_ <= tick <= max_]
        return ticks[:: 1 + len(ticks) // (self.room + 1)]

    def get_labels_for_ticks(self, ticks: Sequence[float]) -> list[str]:
        return [_label(power_of_ten(tick) if self.log else tick) for tick in ticks]


def _label(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) and abs(value) < 1e7 else f"{value:.4g}"


def nice_tick_step(step: float) -> float:
    """The least of 1, 2 or 5 times a power of ten that is not below `step`."""
    power = 10.0 ** floor(log10(step))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= step * (1 - 1e-9))


class _Canvas(Canvas):
    """A canvas whose every line has a style: with NO_COLOR, Textual fails on the empty ones that have none."""

    def render_line(self, y: int) -> Strip:
        strip: Strip = super().render_line(y)
        return strip if strip.cell_length else Strip.blank(self.size.width, self.rich_style)


class _Plot(PlotWidget):  # type: ignore[misc]
    """textual-plot's widget, without its own keys and legend, drawing all at once."""

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
        """As the original, which takes any line; ours have rising x, and this is ten times as fast.

        One that is asked for without a mode is drawn in dashes.
        """
        canvas, frame = self.query_one("#plot", Canvas), self._scale_rectangle
        left, across = self._x_min, frame.width / (self._x_max - self._x_min)
        top, down = self._y_max, frame.height / (self._y_max - self._y_min)
        points = zip(dataset.x.tolist(), dataset.y.tolist(), strict=True)
        inside = [((x - left) * across, (top - y) * down) for x, y in points]
        dashed = dataset.hires_mode is None
        for (x, y), char in cells(inside, frame.width, frame.height).items():
            if dashed and x % 3 == 2:
                continue
            canvas.set_pixel(x + frame.x, y + frame.y, char, dataset.line_style)


class LossChart(Widget, can_focus=True):
    """Draws what it is given; says where the user zooms and pans to, and where they click."""

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
        """The user wants to see this window."""

        chart: "LossChart"
        x: Range
        y: Range

    @dataclass
    class Clicked(Message):
        """The user pointed at this step."""

        chart: "LossChart"
        step: float

    @dataclass
    class Resized(Message):
        """There are more or fewer columns to draw in than before."""

        chart: "LossChart"

    def __init__(self, title: str, id: str) -> None:
        super().__init__(id=id)
        self.title = title
        self.shown = View((0, 1), (0, 1))
        self._titled = title
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
        """How many points of a line can be told apart: two in a cell."""
        return max(2 * (self.size.width - int(self._plot.margin_left) - 2), 2)

    def draw(self, curves: Sequence[Curve], view: View) -> None:
        """Show `curves`; where view.y is None, from their least to their greatest value and a little more."""
        plot = self._plot
        with self.app.batch_update():
            plot.clear()
            curves = [in_powers(curve) for curve in curves] if view.log else curves
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
                    self._draw_band(curve, background.blend(color, BAND).hex)
            for number, (curve, color) in enumerate(zip(curves, colors, strict=True)):
                if curve.dim:
                    self._trace(curve, background.blend(color, DIM).hex)
                    continue
                self._draw_line(curve, color.hex, number)
                self._draw_held_out(curve, color.hex, number)
            self._entitle(any(curve.held_out for curve in curves))
            if view.cursor is not None:
                plot.add_v_line(view.cursor, self.app.theme_variables["foreground"])

    def _draw_band(self, curve: Curve, color: str) -> None:
        """Down and up through every column: where the columns are close, a band."""
        xs = [column.x for column in curve.columns for _ in range(2)]
        ys = [value for column in curve.columns for value in (column.low, column.high)]
        self._plot.plot(xs, ys, color, HiResMode.BRAILLE)

    def _draw_line(self, curve: Curve, color: str, number: int) -> None:
        """The smoothed line with its sign every so many cells, each curve's at other places, and where it is flat."""
        if not curve.columns:
            return
        self._trace(curve, color)
        signs = self._spread(curve.columns, 0.5 + number * 0.37) or [curve.columns[-1]]
        self._mark(signs, curve.sign, f"bold {color}")
        if at := curve.mark():
            self._mark([at], FLAT, f"bold reverse {color}")

    def _trace(self, curve: Curve, color: str) -> None:
        if curve.columns:
            self._plot.plot([c.x for c in curve.columns], [c.mean for c in curve.columns], color, HiResMode.BRAILLE)

    def _draw_held_out(self, curve: Curve, color: str, number: int) -> None:
        """A dashed line through the evaluations, with their mark on them and the run's sign between them."""
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
        middles = [between(one, other) for one, other in pairwise(curve.held_out)]
        self._mark(self._spread(middles, number * 0.37), curve.sign, f"bold {color}")

    def _spread(self, columns: Sequence[Column], phase: float) -> list[Column]:
        """Those of `columns` that are nearest to places SIGN_EVERY cells apart, within the ends."""
        left, right = self.shown.x
        every = (right - left) * 2 * SIGN_EVERY / self.columns
        wanted = [left + every * (i + phase % 1) for i in range(self.columns // (2 * SIGN_EVERY) + 1)]
        return [nearest(columns, x) for x in wanted if columns and columns[0].x <= x <= columns[-1].x]

    def _mark(self, columns: Sequence[Column], sign: str, style: str) -> None:
        self._plot.scatter([c.x for c in columns], [c.mean for c in columns], sign, style)

    def _entitle(self, held_out: bool) -> None:
        """The legend of what is not in every picture."""
        title = f"{self.title} · {HELD_OUT} on held-out examples" if held_out else self.title
        if self._titled != title:
            self._titled = title
            self.query_one(Static).update(title)

    def zoom(self, x: float, y: float = 1.0) -> None:
        """Ask for `x` and `y` times the range, about the cursor or the middle."""
        centre = self.shown.cursor if self.shown.cursor is not None else sum(self.shown.x) / 2
        self._ask(scaled(self.shown.x, centre, x), scaled(self._y, sum(self._y) / 2, y))

    def pan(self, x: float, y: float = 0.0) -> None:
        """Ask for a range further to the right by `x` and further up by `y`, as parts of what is shown."""
        self._ask(shifted(self.shown.x, x), shifted(self._y, y))

    @property
    def _y(self) -> Range:
        assert self.shown.y is not None  # `draw` sets it
        return self.shown.y

    def _ask(self, x: Range, y: Range) -> None:
        """Where a range would be too narrow or too wide for numbers, it stays as it is."""
        self.post_message(self.Moved(self, x if possible(x) else self.shown.x, y if possible(y) else self._y))

    def on_plot_widget_scale_changed(self, event: Any) -> None:
        """The mouse moved the picture."""
        event.stop()
        self._ask((event.x_min, event.x_max), (event.y_min, event.y_max))

    def on_resize(self) -> None:
        self.post_message(self.Resized(self))

    def on_mouse_down(self, event: MouseDown) -> None:
        self._pressed = (event.screen_x, event.screen_y)

    def on_click(self, event: Click) -> None:
        """A click; the end of a drag is none."""
        if self._pressed == (event.screen_x, event.screen_y):
            cell = event.screen_x - self.region.x - self._plot.margin_left - 1
            left, right = self.shown.x
            step = left + (right - left) * (cell + 0.5) / (self.columns / 2)
            if left <= step <= right:
                self.post_message(self.Clicked(self, step))
