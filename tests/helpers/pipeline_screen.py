"""The pipeline screen as a test reads and drives it."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import yaml
from textual.content import Content
from textual.pilot import Pilot

from tests.helpers.pilot import until
from tests.helpers.projects import BRIEF, save
from tui.app import Workbench
from tui.panes.pane import Pane
from tui.screens.pipeline.screen import PipelineScreen

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
    texts = screen.rows.texts()
    return [re.sub(r" +", " ", re.sub("[├└│]", "", text)).strip() for text in texts]


def row(screen: PipelineScreen, label: str) -> str:
    """The row of a stage by its short name, without its time."""
    return next(
        re.sub(r" (\d+ s|<1 s|\d+:\d\d)$", "", row)
        for row in rows(screen)
        if row.split()[1] == label
    )


def title(screen: PipelineScreen, pane: str) -> str:
    """What the border of a pane says."""
    return Content.from_markup(screen.query_one(f"#{pane}", Pane).border_title or "").plain


def facts(screen: PipelineScreen) -> list[str]:
    """The headline and the lines of the stage's facts, with single spaces."""
    lines = [title(screen, "facts"), *screen.facts.plain.splitlines()]
    return [re.sub(r"(?<=\S) +", " ", line).strip() for line in lines]


def said(screen: PipelineScreen) -> str:
    """The facts in one line, as a narrow pane wraps them."""
    return " ".join(facts(screen))


def messages(screen: PipelineScreen) -> str:
    return "\n".join(text for _, _, text in screen.workbench.message_history)


def log_lines(screen: PipelineScreen) -> list[str]:
    """The lines of the log as they are drawn."""
    return screen.log_pane.text.plain.splitlines()


async def choose(pilot: Pilot[None], screen: PipelineScreen, stage: str) -> None:
    """Move the cursor to a stage, as the palette does."""
    screen.open_with(stage=stage)
    await until(pilot, lambda: title(screen, "facts").split(" ")[0] == stage)


async def edit(pilot: Pilot[None], screen: PipelineScreen, key: str, text: str) -> None:
    """Open the field of a param, and type another value."""
    screen.open_with(stage=screen.chosen, param=key)
    await until(pilot, lambda: screen.params.key == key and screen.params.has_focus)
    await pilot.press("enter")
    screen.params.input.value = text
    await pilot.pause()


def params(screen: PipelineScreen) -> dict[str, str]:
    """The lines of the params that are shown, by their keys, and of heads by the key of the head."""
    form, lines = screen.params, dict[str, str]()
    for line in form.lines():
        words = line.removeprefix("●").split()
        label = words[0].rstrip("…") if words else "-"
        key = next((key for key in form.fields if key.startswith(label)), "")
        if label in form.fields or (key and words[0].endswith("…")):
            lines.setdefault(label if label in form.fields else key, line)
        elif line.startswith(("▸", "▾")):
            lines[f"({words[1]})"] = line
    return lines


def below(screen: PipelineScreen) -> str:
    """What is said below the param that the cursor is on."""
    indented = (line for line in screen.params.lines() if line.startswith("    "))
    return " ".join(line.strip() for line in indented if line.strip())


def brief_params(root: Path) -> None:
    """Write the params that the fixture was made with."""
    given = (setting.partition("=") for setting in BRIEF)
    save(root / "params.yaml", {key: yaml.safe_load(value) for key, _, value in given})
