"""The pane of a plot: drawn for its size, zoomed, panned; small, a sparkline."""

from collections.abc import Sequence
from itertools import pairwise
from math import inf, nan
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from textual.events import MouseMove, MouseScrollDown, MouseScrollUp

from tests.helpers.panes import SIZES, Panes, mounted
from tui.panes.plot.drawing import EIGHTHS
from tui.panes.plot.plot import ZOOM, Head, Plot, sparkline
from tui.panes.plot.scale import SMALLEST
from tui.panes.plot.series import Axis, Bars, Line, Point, Series

LINE = Line([(float(x), 10.0 / x) for x in range(1, 101)], "$success", "lora", "0.1", "■")
LOSS = Axis("loss", log=None)


def text(user: Panes) -> str:
    return "\n".join(user.lines)


def span(range_: tuple[float, float]) -> float:
    return range_[1] - range_[0]


# Drawing


async def test_it_is_drawn_for_its_size_again_when_that_changes() -> None:
    plot = Plot()
    async with mounted(plot, size=(60, 12)) as user:
        plot.show([LINE], y=LOSS)
        await user.settle()
        assert "↑ loss" in user.lines[0] and "■ lora 0.1" in text(user)
        assert len(user.messages(Plot.Drawn)) == 1
        await user.resize(40, 8)
        assert "■ lora 0.1" in text(user)
        assert [drawn.control for drawn in user.messages(Plot.Drawn)] == [plot]


async def test_series_are_asked_for_as_many_points_as_can_be_told_apart() -> None:
    plot, asked = Plot(), list[int]()

    def series(columns: int) -> Sequence[Series]:
        asked.append(columns)
        return [LINE]

    async with mounted(plot, size=(60, 12)) as user:
        plot.show(series, y=LOSS)
        for width in (60, 100, 30):
            await user.resize(width, 12)
            assert plot.columns == asked[-1] == 2 * plot.drawing.width
            asked.clear()
            plot.show(series, y=LOSS)
            await user.settle()
            assert asked == [plot.columns], "once a drawing"


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (30, 8), (200, 60)])
@pytest.mark.parametrize("head", [None, Head("grad norm", "0.31")])
async def test_every_size_is_filled(size: tuple[int, int], head: Head | None) -> None:
    plot = Plot(can_zoom=True)
    async with mounted(plot, size=size) as user:
        for series in ([LINE], [Point(1, 2, "●", "name"), Point(3, inf, "○")], []):
            plot.show(series, LOSS, LOSS, cursor=3, head=head, empty="nothing")
            for width, height in (size, *SIZES, size):
                await user.resize(width, height)
                assert [cell_len(line) for line in user.lines] == [width] * height


async def test_nothing_to_draw_is_said() -> None:
    plot = Plot()
    async with mounted(plot, size=(20, 5)) as user:
        plot.show([], empty="No adapter has a [loss] to draw.")
        await user.settle()
        assert " ".join(text(user).split()) == "No adapter has a [loss] to draw."
        plot.show(lambda _: [], empty="none")
        await user.settle()
        assert text(user).split() == ["none"]


async def test_what_is_shown_while_it_is_hidden_is_there_afterwards() -> None:
    plot = Plot()
    plot.display = False
    async with mounted(plot) as user:
        plot.show([LINE])
        plot.display = True
        await user.settle()
        assert "lora 0.1" in text(user)


async def test_lines_have_signs_where_there_are_no_colors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    for count in (1, 4):
        plot = Plot()
        async with mounted(plot) as user:
            plot.show([LINE])
            await user.settle()
            assert text(user).count("■") == count
        monkeypatch.setenv("NO_COLOR", "1")


async def test_a_cursor_is_a_line_at_its_x() -> None:
    plot = Plot()
    async with mounted(plot) as user:
        plot.show([LINE], cursor=50)
        await user.settle()
        columns = {line.index("│") for line in user.lines if "│" in line}
        assert len(columns) == 1
        x = plot.drawing.x_at(columns.pop())
        assert x is not None and abs(x - 50) < 2


# Small


async def test_with_a_head_it_is_a_small_plot_and_a_sparkline_where_it_is_low() -> None:
    plot = Plot()
    async with mounted(plot, size=(30, 6)) as user:
        plot.show([LINE], LOSS, LOSS, head=Head("grad norm", "0.31", "$error"))
        await user.settle()
        assert user.lines[0].split() == ["grad", "norm", "0.31"] and len(user.lines[0]) == 30
        assert "⡀" <= max(text(user)) <= "⣿"
        await user.resize(30, 3)
        assert user.lines[0].startswith("grad norm ") and user.lines[0].endswith("▁ 0.31")
        assert "█" in user.lines[0]
        plot.show([Bars(lambda _: [(1.0, "")])], head=Head("no line", "1"))
        await user.settle()
        assert user.lines[0].split() == ["no", "line", "1"]


async def test_a_head_longer_than_its_plot_keeps_the_value() -> None:
    plot = Plot()
    async with mounted(plot, size=(12, 8)) as user:
        for name in ("x" * 100, "世界" * 20, "[red]"):
            plot.show([LINE], head=Head(name, "0.31"))
            await user.settle()
            assert user.lines[0].endswith(" 0.31") and cell_len(user.lines[0]) == 12


async def test_the_head_shows_the_focus() -> None:
    plot, other = Plot(), Plot()
    async with mounted(plot, other, size=(30, 12)) as user:
        plot.show([LINE], head=Head("first"))
        other.show([LINE], head=Head("second"))
        await user.settle()
        for shown in (plot, other):
            shown.focus()
            await user.settle()
            styles = {widget: str(widget.line(0).spans[0].style) for widget in (plot, other)}
            assert [widget for widget in styles if "reverse" in styles[widget]] == [shown]


# Zoom, pan, clicks


async def test_zoom_and_pan_post_the_ranges_that_they_ask_for() -> None:
    plot = Plot(can_zoom=True)
    async with mounted(plot) as user:
        plot.show([LINE], Axis(range=(0, 100)), Axis(range=(0, 10)))
        plot.zoom(0.5)
        plot.zoom(2, 0.5, centre=0)
        plot.pan(0.1, -0.5)
        await user.settle()
        moved = user.messages(Plot.Moved)
        assert [(event.x, event.y) for event in moved] == [
            ((25, 75), (0, 10)),
            ((0, 200), (2.5, 7.5)),
            ((10, 110), (-5, 5)),
        ]
        assert moved[0].control is plot


async def test_a_range_that_cannot_be_drawn_stays_as_it_is() -> None:
    plot = Plot(can_zoom=True)
    async with mounted(plot) as user:
        for range_ in ((0.0, SMALLEST), (1.0, 1.0 + 1e-9), (-1e301, 1e301)):
            plot.show([LINE], Axis(range=range_))
            plot.zoom(0.1 if span(range_) < 1 else 100)
            await user.settle()
            [moved] = user.messages(Plot.Moved)
            assert moved.x == (plot.drawing.x.low, plot.drawing.x.high)


async def test_the_wheel_zooms_about_the_pointer() -> None:
    plot = Plot(can_zoom=True)
    async with mounted(plot) as user:
        plot.show([LINE], Axis(range=(0, 100)), Axis(range=(0, 10)))
        await user.settle()
        for event, factor in ((MouseScrollUp, ZOOM), (MouseScrollDown, 1 / ZOOM)):
            x = plot.drawing.x_at(30)
            assert x is not None
            await wheel(user, plot, event, 30)
            [moved] = user.messages(Plot.Moved)
            assert span(moved.x) == pytest.approx(100 * factor)
            assert moved.x[0] + (x / 100) * span(moved.x) == pytest.approx(x)
            assert moved.y == (0, 10)


async def test_a_plot_that_does_not_zoom_leaves_the_wheel_to_what_it_is_in() -> None:
    plot = Plot()
    async with mounted(plot) as user:
        plot.show([LINE])
        await wheel(user, plot, MouseScrollUp, 30)
        assert not user.messages(Plot.Moved)


async def wheel(user: Panes, plot: Plot, event: Any, x: int) -> None:
    await user.pilot._post_mouse_events([event], widget=plot, offset=(x, 3))
    await user.settle()


async def test_dragging_moves_what_is_seen_and_is_no_click() -> None:
    plot = Plot(can_zoom=True)
    async with mounted(plot) as user:
        plot.show([LINE], Axis(range=(0, 100)), Axis(range=(0, 10)))
        await user.settle()
        left = MouseMove(plot, 20, 3, -10, 1, 1, False, False, False)
        await user.pilot.mouse_down(plot, offset=(30, 3))
        plot.post_message(left)
        await user.settle()
        await user.pilot.mouse_up(plot, offset=(20, 3))
        moved = user.messages(Plot.Moved)[0]
        assert moved.x[0] == pytest.approx(100 * 10 / plot.drawing.width)
        assert moved.y[0] == pytest.approx(10 / (len(plot.drawing.rows) - 1))
        assert span(moved.x) == pytest.approx(100) and span(moved.y) == pytest.approx(10)
        plot.post_message(left)
        await user.settle()
        assert not user.messages(Plot.Moved), "the button is up"
        await user.pilot.mouse_down(plot, offset=(30, 3))
        plot.post_message(left)
        await user.pilot.mouse_up(plot, offset=(20, 3))
        await user.click(plot, 20, 3)
        assert len(user.messages(Plot.Clicked)) == 1, "a click that follows is one"


async def test_a_click_tells_its_x_and_beside_the_area_nothing() -> None:
    plot = Plot()
    async with mounted(plot) as user:
        plot.show([LINE], y=LOSS)
        await user.settle()
        await user.click(plot, plot.drawing.left + 5, 4)
        [clicked] = user.messages(Plot.Clicked)
        assert clicked.x == plot.drawing.x_at(plot.drawing.left + 5) and clicked.control is plot
        await user.click(plot, 0, 4)
        await user.click(plot, 59, 4)
        assert not user.messages(Plot.Clicked)


# Sparklines


def test_the_lowest_is_an_eighth_and_the_highest_is_full() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"


def test_fewer_values_than_columns_stand_at_the_right() -> None:
    assert sparkline([0, 7], 5) == "   ▁█"


@pytest.mark.parametrize(
    ("values", "row"),
    [([], "   "), ([3, 3, 3], "▁▁▁"), ([nan, 1, 2], " ▁█"), ([inf, -inf, nan], "   ")],
    ids=["nothing", "constant", "hole", "not finite"],
)
def test_nothing_a_constant_and_a_hole(values: list[float], row: str) -> None:
    assert sparkline(values, 3) == row


def test_more_values_than_columns_are_averaged() -> None:
    assert sparkline([0, 0, 7, 7], 2) == "▁█"


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=20))
def test_more_is_never_lower(values: list[float]) -> None:
    row = sparkline(values, len(values))
    by_value = sorted(zip(values, row, strict=True))
    assert all(a <= b for (_, a), (_, b) in pairwise(by_value))


@given(st.floats(-1e300, 1e300), st.integers(1, 40), st.integers(1, 20))
def test_a_constant_is_a_line_however_it_is_averaged(value: float, count: int, width: int) -> None:
    assert set(sparkline([value] * count, width).strip()) == {"▁"}


@given(st.lists(st.floats()), st.integers(0, 20))
def test_any_values_fill_the_width(values: list[float], width: int) -> None:
    row = sparkline(values, width)
    assert len(row) == width and set(row) <= set(EIGHTHS)
