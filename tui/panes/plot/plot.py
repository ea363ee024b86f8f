"""The pane of a plot: zoomed, panned, with a cursor; small, a line with a sparkline."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from typing import Any, ClassVar

from rich.cells import cell_len
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.events import Click, MouseDown, MouseMove, MouseScrollDown, MouseScrollUp, MouseUp
from textual.message import Message
from textual.widget import Widget

from tui.panes.lines import MUTED
from tui.panes.plot.drawing import EIGHTHS, Drawing, draw
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


class Plot(Widget, can_focus=True):
    """Series in all of the widget: `shown` are drawn as `drawing`. With a `head`, Enter or a click
    opens it.
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "open", "Open", show=False)]
    DEFAULT_CSS = """
    Plot { height: 1fr; width: 1fr; }
    """

    @dataclass
    class Moved(Message):
        """The user zoomed or panned to these ranges; `y` is in exponents of ten on a logarithmic
        scale.
        """

        plot: "Plot"
        x: Range
        y: Range

        @property
        def control(self) -> "Plot":
            return self.plot

    @dataclass
    class Clicked(Message):
        """The user clicked at this x."""

        plot: "Plot"
        x: float

        @property
        def control(self) -> "Plot":
            return self.plot

    @dataclass
    class Opened(Message):
        """Enter or a click on a plot with a head."""

        plot: "Plot"

        @property
        def control(self) -> "Plot":
            return self.plot

    @dataclass
    class Drawn(Message):
        """It was drawn for another size."""

        plot: "Plot"

        @property
        def control(self) -> "Plot":
            return self.plot

    def __init__(self, *, can_zoom: bool = False, **options: Any) -> None:
        super().__init__(**options)
        self.can_zoom = can_zoom
        self.drawing = NOTHING
        self._series: DrawnFor = lambda _: ()
        self.shown: Sequence[Series] = ()
        self._how: dict[str, Any] = {}
        self._head: Head | None = None
        self._pressed = self._dragged = False
        self._empty = ""

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
        self.refresh()

    def _draw_series(self) -> None:
        width, height = self.content_size
        height -= bool(self._head)
        self.shown = self._series(self.columns)
        self.drawing = NOTHING
        if height >= (1 if self._head is None else LOW):
            signs = self.app.no_color
            self.drawing = draw(self.shown, width, height, **self._how, signs=signs)

    def on_resize(self) -> None:
        self._draw()
        self.post_message(self.Drawn(self))

    def render(self) -> Content:
        width, height = self.content_size
        if not self.shown:
            return Content.styled(self._empty, MUTED)
        if self._head is None:
            return Content("\n").join(self.drawing.rows)
        if height - 1 < LOW:
            return self._sparkline(self._head, width)
        return Content("\n").join([self._head_line(self._head, width), *self.drawing.rows])

    def _head_line(self, head: Head, width: int) -> Content:
        room = max(width - cell_len(head.value) - 1, 0)
        name = pad_or_truncate(head.name, min(cell_len(head.name), room))
        gap = " " * (room - cell_len(name) + 1)
        style = "bold reverse" if self.has_focus else "bold"
        return Content.assemble((name, style), gap, (head.value, head.style))

    def _sparkline(self, head: Head, width: int) -> Content:
        """`grad norm ▇▅▃▁ 0.31`"""
        lines = [each for each in self.shown if isinstance(each, Line) and each.points]
        values = [value for _, value in lines[-1].points] if lines else []
        room = max(width - cell_len(f"{head.name}  {head.value}"), 0)
        style = "bold reverse" if self.has_focus else "bold"
        text = f" {sparkline(values, room)} {head.value}"
        return Content.assemble((head.name, style), (text, head.style))

    def on_focus(self) -> None:
        self.refresh()

    def on_blur(self) -> None:
        self.refresh()

    # Zoom and pan

    def zoom(self, x: float, y: float = 1.0, centre: float | None = None) -> None:
        """Scale the ranges, about `centre` or the middle."""
        old = self.drawing
        self._move(_scaled(_range(old, "x"), centre, x), _scaled(_range(old, "y"), None, y))

    def pan(self, x: float, y: float = 0.0) -> None:
        """Shift the ranges right by `x` and up by `y`, as shares of what is visible."""
        self._move(_shifted(_range(self.drawing, "x"), x), _shifted(_range(self.drawing, "y"), y))

    def _move(self, x: Range, y: Range) -> None:
        """Post the new ranges; one that cannot be drawn stays as it is."""
        before = _range(self.drawing, "x"), _range(self.drawing, "y")
        ranges = [new if is_drawable(new) else old for new, old in zip((x, y), before, strict=True)]
        self.post_message(self.Moved(self, ranges[0], ranges[1]))

    def on_mouse_scroll_up(self, event: MouseScrollUp) -> None:
        self._wheel(event, ZOOM)

    def on_mouse_scroll_down(self, event: MouseScrollDown) -> None:
        self._wheel(event, 1 / ZOOM)

    def _wheel(self, event: MouseScrollUp | MouseScrollDown, factor: float) -> None:
        if self.can_zoom:
            event.stop()
            self.zoom(factor, centre=self.drawing.x_at(event.x))

    def on_mouse_down(self, _: MouseDown) -> None:
        self._pressed, self._dragged = True, False
        self.capture_mouse()

    def on_mouse_move(self, event: MouseMove) -> None:
        """While the button is down: the point under the pointer stays under it."""
        if self._pressed and self.can_zoom and (event.delta_x or event.delta_y):
            self._dragged = True
            rows = max(len(self.drawing.rows) - 1, 1)
            self.pan(-event.delta_x / self.drawing.width, event.delta_y / rows)

    def on_mouse_up(self, _: MouseUp) -> None:
        self._pressed = False
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
    edges = [len(values) * n // count for n in range(count + 1)] if count else []
    parts = [values[start:end] for start, end in pairwise(edges)]
    means = [_mean(part) for part in parts]
    known = [mean for mean in means if mean is not None]
    low, high = min(known, default=0.0), max(known, default=1.0)
    is_flat = not is_drawable((low, high))
    marks = []
    for mean in means:
        share = 0.0 if mean is None or is_flat else (mean - low) / (high - low)
        marks.append(" " if mean is None else EIGHTHS[1 + round(share * 7)])
    return "".join(marks).rjust(width)


def _mean(values: Sequence[float]) -> float | None:
    finite = [value for value in values if isfinite(value)]
    return sum(value / len(finite) for value in finite) if finite else None


def _range(drawing: Drawing, axis: str) -> Range:
    scale = getattr(drawing, axis)
    return scale.low, scale.high


def _scaled(range_: Range, centre: float | None, factor: float) -> Range:
    if factor == 1:  # the same, and not only nearly
        return range_
    middle = sum(range_) / 2 if centre is None else centre
    low, high = (middle + (end - middle) * factor for end in range_)
    return low, high


def _shifted(range_: Range, part: float) -> Range:
    by = (range_[1] - range_[0]) * part
    return range_[0] + by, range_[1] + by
