"""The Curves screen of a project, for tests: opened, drawn, read as a user reads it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from textual.pilot import Pilot

from tests.helpers.pilot import screen_opens, until
from tui.app import Workbench
from tui.screens.curves.panes import AnswersPane, ChartPane, DetailsPane, RunList, SmallPlots
from tui.screens.curves.screen import CurvesScreen
from tui.widgets.plot.chart import PlotWidget
from tui.widgets.plot.line_plot import text


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
        views = [screen.runs.views[key] for key in screen.runs.shown]
        return (
            screen.runs.stamp is not None
            and not screen._reading
            and not any(view.changed() for view in views)
        )

    # a read that began earlier may miss what was written since
    await until(pilot, lambda: not screen._reading)
    screen.files_changed()
    await pilot.pause()
    await until(pilot, done)


def drawn_text(widget: PlotWidget) -> str:
    """The characters of a plot."""
    return text(widget._rows).plain


def chart_text(screen: CurvesScreen) -> str:
    return drawn_text(screen.chart)


def small_text(screen: CurvesScreen) -> str:
    return drawn_text(screen.query_one(SmallPlots))


def title(screen: CurvesScreen) -> str:
    """Of the large chart."""
    return screen.query_one(ChartPane)._title_text.plain


def list_lines(screen: CurvesScreen) -> list[str]:
    """The runs' lines, with single spaces."""
    return [" ".join(str(option.prompt).split()) for option in screen.query_one(RunList).options]


def list_text(screen: CurvesScreen) -> str:
    return "\n".join(list_lines(screen))


def details_text(screen: CurvesScreen) -> str:
    return screen.query_one(DetailsPane).text.plain


def answers_text(screen: CurvesScreen) -> str:
    return screen.query_one(AnswersPane).text.plain if screen.has_class("-answers") else ""


def names_on(screen: CurvesScreen) -> set[str]:
    """The runs that are on."""
    return {screen.runs.views[key].name for key in screen.runs.shown}


async def point_to(pilot: Pilot[Any], screen: CurvesScreen, name: str) -> None:
    """Move the cursor of the list to a run, or to an adapter of a sweep."""
    runs = screen.query_one(RunList)
    screen.set_focus(runs)
    words = [str(option.prompt).split() for option in runs.options]
    runs.highlighted = next(i for i, line in enumerate(words) if name in line)
    await pilot.pause()


async def save_as(pilot: Pilot[Any], path: str) -> None:
    """Press x and type a path."""
    from textual.widgets import Input

    from tui.dialogs import PathScreen

    await pilot.press("x")
    await screen_opens(pilot, PathScreen)
    pilot.app.screen.query_one(Input).value = path
    await pilot.press("enter")
