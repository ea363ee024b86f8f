"""The pipeline screen as a test reads and drives it."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import yaml
from textual.pilot import Pilot

from tests.helpers.pilot import until
from tests.helpers.projects import BRIEF, save
from tui.app import Workbench
from tui.screens.pipeline.facts import FactsPane
from tui.screens.pipeline.log_pane import LogView
from tui.screens.pipeline.screen import PipelineScreen
from tui.screens.pipeline.stages_pane import StageTree

Opened = tuple[Pilot[None], PipelineScreen]


@asynccontextmanager
async def open_screen(root: Path, size: tuple[int, int] = (120, 40)) -> AsyncIterator[Opened]:
    """The screen, all states shown."""
    app = Workbench(root / "params.yaml")
    async with app.run_test(size=size) as pilot:
        await pilot.pause()
        screen, watch = app.screen, app.project_watch
        assert isinstance(screen, PipelineScreen)
        await until(pilot, lambda: watch.problem or len(watch.states) == len(watch.stages))
        yield pilot, screen


def rows(screen: PipelineScreen) -> list[str]:
    """The rows of the tree, without its lines and with single spaces."""
    prompts = (str(option.prompt) for option in screen.query_one(StageTree).options)
    return [re.sub(r" +", " ", re.sub("[├└│]", "", prompt)).strip() for prompt in prompts]


def row(screen: PipelineScreen, label: str) -> str:
    """The row of a stage by its short name, without its time."""
    return next(
        re.sub(r" (\d+ s|<1 s|\d+:\d\d)$", "", row)
        for row in rows(screen)
        if row.split()[1] == label
    )


def facts(screen: PipelineScreen) -> list[str]:
    """The headline and the lines of the stage's facts."""
    pane = screen.query_one(FactsPane)
    return [pane.headline, *(f"{label} {text}".strip() for label, text, _ in pane.facts)]


def messages(screen: PipelineScreen) -> str:
    return "\n".join(text for _, _, text in screen.workbench.message_history)


def log_lines(screen: PipelineScreen) -> list[str]:
    return screen.query_one(LogView).lines


async def choose(pilot: Pilot[None], screen: PipelineScreen, stage: str) -> None:
    """Move the cursor to a stage, as the palette does."""
    screen.open_with(stage=stage)
    await until(pilot, lambda: screen.params_pane.stage == stage)


async def edit(pilot: Pilot[None], screen: PipelineScreen, key: str, text: str) -> None:
    """Open the field of a param, and type another value."""
    screen.open_with(stage=screen.chosen, param=key)
    await pilot.press("enter")
    screen.params_pane.field.value = text
    await pilot.pause()


def below(screen: PipelineScreen) -> str:
    """What is said below the param that the cursor is on."""
    return " ".join(part.plain.strip() for part in screen.params_pane.list.below)


def brief_params(root: Path) -> None:
    """Write the params that the fixture was made with."""
    given = (setting.partition("=") for setting in BRIEF)
    save(root / "params.yaml", {key: yaml.safe_load(value) for key, _, value in given})
