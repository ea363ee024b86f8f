"""A widget that shows lines, and says where the user zooms, pans and clicks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual.events import Click, MouseDown, MouseMove, MouseScrollDown, MouseScrollUp, MouseUp
from textual.geometry import Region
from textual.message import Message
from textual.strip import Strip
from textual.widget import Widget

from tui.widgets.plot.line_plot import Ink, Line, LinePlot, Row, View, line_plot
from tui.widgets.plot.scale import Range, is_drawable

ZOOM = 0.7  # of the range that stays visible; 1 / ZOOM takes it back


class PlotWidget(Widget):
    """Rows of styled text, of which only those that changed are drawn again."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {"plot--tick", "plot--grid", "plot--cursor"}
    DEFAULT_CSS = """
    PlotWidget { height: 1fr; }
    PlotWidget > .plot--tick { color: $foreground 65%; }
    PlotWidget > .plot--grid { color: $foreground 18%; }
    PlotWidget > .plot--cursor { color: $accent; }
    """
    _rows: Sequence[Row] = ()

    @property
    def ink(self) -> Ink:
        """The theme's colours of ticks, grid and cursor."""
        background = self.background_colors[1]
        styles = (self.get_component_styles(f"plot--{part}") for part in ("tick", "grid", "cursor"))
        return Ink(*((background + style.color).hex6 for style in styles))

    def show_rows(self, rows: Sequence[Row]) -> None:
        before, self._rows = self._rows, rows
        if len(before) != len(rows):
            self.refresh()
            return
        changed = [y for y, (old, new) in enumerate(zip(before, rows, strict=True)) if old != new]
        if changed:
            self.refresh(*(Region(0, y, self.size.width, 1) for y in changed))

    def render_line(self, y: int) -> Strip:
        base = self.rich_style
        row = self._rows[y] if y < len(self._rows) else []
        segments = [
            Segment(text, base + Style.parse(style) if style else base) for text, style in row
        ]
        return Strip(segments).adjust_cell_length(self.size.width, base)


class Chart(PlotWidget, can_focus=True):
    """Lines in all of the widget. `shown` is what is drawn, with the ranges that were fitted."""

    @dataclass
    class Moved(Message):
        """The user zoomed or panned to these ranges; `y` is in exponents of ten on a logarithmic
        scale.
        """

        x: Range
        y: Range

    @dataclass
    class Clicked(Message):
        """The user clicked at this x."""

        x: float

    class Resized(Message):
        """The number of columns changed, so the lines must be reduced again."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.plot = LinePlot([], (0.0, 1.0), (0.0, 1.0), 0, 1)
        self._pressed: tuple[int, int] | None = None
        self._dragged = False

    @property
    def columns(self) -> int:
        """How many points of a line can be told apart."""
        return max(2 * self.plot.width, 2) if self.plot.rows else max(2 * self.size.width, 2)

    def draw(self, lines: Sequence[Line], view: View) -> None:
        self.plot = line_plot(lines, *self.size, view, self.ink, signs=self.app.no_color)
        self.show_rows(self.plot.rows)

    def zoom(self, x: float, y: float = 1.0, centre: float | None = None) -> None:
        """Scale the ranges, about `centre` or the middle."""
        self._move(
            _scaled(self.plot.x, sum(self.plot.x) / 2 if centre is None else centre, x),
            _scaled(self.plot.y, sum(self.plot.y) / 2, y),
        )

    def pan(self, x: float, y: float = 0.0) -> None:
        """Shift the ranges right by `x` and up by `y`, as shares of what is visible."""
        self._move(_shifted(self.plot.x, x), _shifted(self.plot.y, y))

    def _move(self, x: Range, y: Range) -> None:
        """Post the new ranges; one that cannot be drawn stays as it is."""
        old = self.plot
        self.post_message(
            self.Moved(x if is_drawable(x) else old.x, y if is_drawable(y) else old.y)
        )

    def on_resize(self) -> None:
        self.post_message(self.Resized())

    def on_mouse_scroll_up(self, event: MouseScrollUp) -> None:
        event.stop()
        self.zoom(ZOOM, centre=self.plot.x_at(event.x))

    def on_mouse_scroll_down(self, event: MouseScrollDown) -> None:
        event.stop()
        self.zoom(1 / ZOOM, centre=self.plot.x_at(event.x))

    def on_mouse_down(self, event: MouseDown) -> None:
        self._pressed, self._dragged = (event.screen_x, event.screen_y), False
        self.capture_mouse()

    def on_mouse_move(self, event: MouseMove) -> None:
        """While the button is down: the point under the pointer stays under it."""
        if self._pressed and (event.delta_x or event.delta_y):
            self._dragged = True
            rows = max(len(self.plot.rows) - 1, 1)
            self.pan(-event.delta_x / self.plot.width, event.delta_y / rows)

    def on_mouse_up(self, _: MouseUp) -> None:
        self._pressed = None
        self.release_mouse()

    def on_click(self, event: Click) -> None:
        if not self._dragged and (x := self.plot.x_at(event.x)) is not None:
            self.post_message(self.Clicked(x))


def _scaled(range_: Range, centre: float, factor: float) -> Range:
    low, high = (centre + (end - centre) * factor for end in range_)
    return low, high


def _shifted(range_: Range, part: float) -> Range:
    by = (range_[1] - range_[0]) * part
    return range_[0] + by, range_[1] + by
