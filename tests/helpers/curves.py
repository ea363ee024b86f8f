"""The Curves screen of a project, for tests: opened, drawn, read as a user reads it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from textual.content import Content
from textual.pilot import Pilot

from tests.helpers.pilot import screen_opens, until
from tui.app import Workbench
from tui.panes.plot.plot import Plot
from tui.panes.plot.scale import Range
from tui.screens.curves.plots import Window
from tui.screens.curves.screen import CurvesScreen
from tui.screens.curves.words import best_of, details


@asynccontextmanager
async def open_curves(
    root: Path, size: tuple[int, int] = (120, 40)
) -> AsyncIterator[tuple[Pilot[Any], CurvesScreen]]:
    """Open the screen and wait until it has read the files."""
    app = Workbench(root / "params.yaml")
    app.first_screen = "curves"
    async with app.run_test(size=size) as pilot:
        screen = app.screen
        assert isinstance(screen, CurvesScreen)
        await wait_until_drawn(pilot, screen)
        yield pilot, screen


async def wait_until_drawn(pilot: Pilot[Any], screen: CurvesScreen) -> None:
    """Wait until all files are read and drawn."""

    def done() -> bool:
        return (
            bool(screen.runs.stamp)
            and not screen.is_reading
            and not screen.is_stale
            and not any(curve.changed() for curve in screen.runs.curves)
        )

    # a read that began earlier may miss what was written since
    await until(pilot, lambda: not screen.is_reading)
    screen.files_changed()
    await pilot.pause()
    await until(pilot, done)
    await pilot.pause()


def window(screen: CurvesScreen) -> Window:
    return screen.plots.window


def ranges(screen: CurvesScreen) -> tuple[Range, Range]:
    """The steps and values that the large plot shows."""
    drawing = screen.plots.chart.drawing
    return (drawing.x.low, drawing.x.high), (drawing.y.low, drawing.y.high)


def chart_text(screen: CurvesScreen) -> str:
    return plot_text(screen.plots.chart)


def plot_text(plot: Plot) -> str:
    return plot.plain


def small_plots(screen: CurvesScreen) -> dict[str, Plot]:
    """Those that are shown, by their metrics."""
    return {name: plot for name, plot in screen.plots.small.items() if plot.display}


def small_text(screen: CurvesScreen) -> str:
    """The small plots, one below the other, and the numbers."""
    constants = screen.plots.constants
    numbers = str(constants.content) if constants.display else ""
    return "\n".join([*map(plot_text, small_plots(screen).values()), numbers])


def title(screen: CurvesScreen) -> str:
    """Of the large chart."""
    return Content.from_markup(str(screen.query_one("#chart").border_title)).plain


def list_lines(screen: CurvesScreen) -> list[str]:
    """The runs' lines, with single spaces."""
    return [" ".join(line.split()) for line in screen.table.texts()]


def list_text(screen: CurvesScreen) -> str:
    return "\n".join(list_lines(screen))


def details_text(screen: CurvesScreen) -> str:
    """The pane, as it would be with room for whole lines."""
    pointed = best_of(screen.table.pointed)
    lines = details(pointed, window(screen).cursor) if pointed else ()
    return "\n".join(line.plain for line in lines)


def answers_text(screen: CurvesScreen) -> str:
    return screen.answers.plain if screen.has_class("-answers") else ""


def names_on(screen: CurvesScreen) -> set[str]:
    """The runs that are on."""
    return {view.name for view in screen.runs.on}


async def point_to(pilot: Pilot[Any], screen: CurvesScreen, name: str) -> None:
    """Move the cursor of the list to a run, or to an adapter of a sweep."""
    screen.set_focus(screen.table)
    words = [line.split() for line in screen.table.texts()]
    line = next(number for number, parts in enumerate(words) if name in parts)
    await pilot.press("g", *["j"] * line)
    await pilot.pause()


async def save_as(pilot: Pilot[Any], path: str) -> None:
    """Press x and type a path."""
    from textual.widgets import Input

    from tui.dialogs import AskText

    await pilot.press("x")
    await screen_opens(pilot, AskText)
    pilot.app.screen.query_one(Input).value = path
    await pilot.press("enter")
