"""The pane of a plot: zoomed, panned, with a cursor; small, a line with a sparkline."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite, nan
from typing import Any, ClassVar

from rich.cells import cell_len
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.events import Click, MouseDown, MouseMove, MouseScrollDown, MouseScrollUp, MouseUp

from tui.panes.lines import MUTED, FromPane, Lines, wrapped
from tui.panes.plot.drawing import EIGHTHS, draw
from tui.panes.plot.scale import Range, is_drawable
from tui.panes.plot.series import Axis, Line, Series
from tui.widgets.cells import pad_or_truncate

ZOOM = 0.7  # of the range that stays visible; 1 / ZOOM takes it back
LOW = 3  # rows below which lines are drawn as a sparkline
NOTHING = draw([], 0, 0)._replace(width=0)
DrawnFor = Callable[[int], Sequence[Series]]  # the series for so many points that can be told apart


@dataclass(frozen=True)
class Head:
    """The line above a small plot: its name, and the value of one line in its style."""

    name: str
    value: str = ""
    style: str = ""


class Plot(Lines, inherit_bindings=False):
    """Series in all of the widget: `shown` are drawn as `drawing`. With a `head`, Enter or a click
    opens it.
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "open", "Open", show=False)]
    DEFAULT_CSS = """
    Plot { width: 1fr; overflow: hidden hidden; }
    """

    @dataclass
    class Moved(FromPane):
        """The user zoomed or panned to these ranges; `y` is in exponents of ten on a logarithmic
        scale.
        """

        x: Range
        y: Range

    @dataclass
    class Clicked(FromPane):
        """The user clicked at this x."""

        x: float

    class Opened(FromPane):
        """Enter or a click on a plot with a head."""

    class Drawn(FromPane):
        """It was drawn for another size."""

    def __init__(self, *, can_zoom: bool = False, name: str | None = None) -> None:
        super().__init__(name=name)
        self.can_zoom = can_zoom
        self.drawing = NOTHING
        self._series: DrawnFor = lambda _: ()
        self.shown: Sequence[Series] = ()
        self._how: dict[str, Any] = {}
        self._head: Head | None = None
        self._dragged = False
        self._empty = ""
        self._lines: Sequence[Content] = ()

    def show(
        self,
        series: Sequence[Series] | DrawnFor,
        x: Axis = Axis(),  # noqa: B008  # it is frozen
        y: Axis = Axis(),  # noqa: B008
        *,
        cursor: float | None = None,
        head: Head | None = None,
        empty: str = "",
    ) -> None:
        """Draw these series; `empty` is written where there are none."""
        self._series = series if callable(series) else lambda _: series
        self._how = {"x_axis": x, "y_axis": y, "cursor": cursor}
        self._head, self._empty = head, empty
        self._draw()

    @property
    def columns(self) -> int:
        """How many points of a line can be told apart."""
        return max(2 * (self.drawing.width or self.content_size.width), 2)

    def _draw(self) -> None:
        if self.content_size:
            before = self.drawing.width
            self._draw_series()
            if self.drawing.width != before:  # for which the series were
                self._draw_series()
            self._find_lines()

    def _draw_series(self) -> None:
        width, height = self.content_size
        height -= bool(self._head)
        self.shown = self._series(self.columns)
        self.drawing = NOTHING
        if height >= (1 if self._head is None else LOW):
            signs = self.app.no_color
            self.drawing = draw(self.shown, width, height, **self._how, signs=signs)

    def lay_out(self) -> None:
        self._draw()
        self.post_message(self.Drawn(self))

    def _find_lines(self) -> None:
        self._lines = self.drawing.rows
        if not self.shown:
            self._lines = wrapped(Content.styled(self._empty, MUTED), self.content_size.width)
        elif self._head:
            self._lines = [Content(), *self.drawing.rows]
        self.set_size(0, len(self._lines))

    def line(self, number: int) -> Content:
        if self._head and self.shown and number == 0:
            return self._head_line(self._head)  # which shows the focus
        return self._lines[number]

    def _head_line(self, head: Head) -> Content:
        """`grad norm ▇▅▃▁ 0.31`; the sparkline only where nothing is drawn below."""
        room = max(self.content_size.width - cell_len(head.value) - 1, 0)
        name = pad_or_truncate(head.name, min(cell_len(head.name), room))
        room -= cell_len(name)
        rest = Content.assemble(" " * (room + 1), (head.value, head.style))
        if not self.drawing.rows:
            lines = [each for each in self.shown if isinstance(each, Line)]
            values = [value for line in lines[-1:] for _, value in line.points]
            text = f" {sparkline(values, room - 1)} {head.value}"
            rest = Content.styled(text, head.style)
        style = "bold reverse" if self.has_focus else "bold"
        return Content.assemble((name, style), rest)

    # Zoom and pan

    def zoom(self, x: float, y: float = 1.0, centre: float | None = None) -> None:
        """Scale the ranges, about `centre` or the middle."""
        old = self.drawing
        self.post_message(self.Moved(self, old.x.zoomed(x, centre), old.y.zoomed(y)))

    def pan(self, x: float, y: float = 0.0) -> None:
        """Shift the ranges right by `x` and up by `y`, as shares of what is visible."""
        old = self.drawing
        self.post_message(self.Moved(self, old.x.panned(x), old.y.panned(y)))

    def on_mouse_scroll_up(self, event: MouseScrollUp) -> None:
        self._wheel(event, ZOOM)

    def on_mouse_scroll_down(self, event: MouseScrollDown) -> None:
        self._wheel(event, 1 / ZOOM)

    def _wheel(self, event: MouseScrollUp | MouseScrollDown, factor: float) -> None:
        if self.can_zoom:
            event.stop()
            self.zoom(factor, centre=self.drawing.x_at(event.x))

    def on_mouse_down(self, _: MouseDown) -> None:
        self._dragged = False
        self.capture_mouse()

    def on_mouse_move(self, event: MouseMove) -> None:
        """While the button is down: the point under the pointer stays under it."""
        is_pressed = self.app.mouse_captured is self
        if is_pressed and self.can_zoom and (event.delta_x or event.delta_y):
            self._dragged = True
            rows = max(len(self.drawing.rows) - 1, 1)
            self.pan(-event.delta_x / self.drawing.width, event.delta_y / rows)

    def on_mouse_up(self, _: MouseUp) -> None:
        self.release_mouse()

    def on_click(self, event: Click) -> None:
        x = self.drawing.x_at(event.x)
        if self._head:
            self.action_open()
        elif not self._dragged and x is not None:
            self.post_message(self.Clicked(self, x))

    def action_open(self) -> None:
        if self._head:
            self.post_message(self.Opened(self))


def sparkline(values: Sequence[float], width: int) -> str:
    """One row, the newest value at the right; a column is the mean of its values.

    The lowest is an eighth of a cell high, so that a constant is a line; one that is not finite is
    blank. Fewer values than columns are not stretched.
    """
    count = min(len(values), width)
    edges = [len(values) * n // max(count, 1) for n in range(count + 1)]
    means = [_mean(values[start:end]) for start, end in pairwise(edges)]
    known = [mean for mean in means if isfinite(mean)]
    low, high = min(known, default=0.0), max(known, default=0.0)
    row = ""
    for mean in means:
        share = (mean - low) / (high - low) if is_drawable((low, high)) else 0.0
        row += EIGHTHS[1 + round(share * 7)] if isfinite(mean) else " "
    return row.rjust(width)


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if isfinite(value)]
    return sum(value / len(finite) for value in finite) if finite else nan
