"""NO_COLOR: every screen and every dialog is drawn in shades of grey."""

import re
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from textual.color import Color
from textual.screen import Screen

from tests.helpers.fake_engine import FakeInference
from tests.helpers.pilot import until
from tests.helpers.run_folders import write_measured, write_methods
from tui.app import Workbench
from tui.dialogs import Ask, AskText, Reader, draw_messages
from tui.help import page
from tui.panes.plot.plot import Plot
from tui.registry import SCREENS
from tui.screens.conversation.sampling import Sampling, SamplingDialog

BUTTONS = {"#ff5f57", "#febc2e", "#28c840"}  # of the window that Textual draws around a screenshot


@pytest.fixture
def watched(empty: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Runs of several methods, one with held-out examples; NO_COLOR is set."""
    monkeypatch.setenv("NO_COLOR", "1")
    write_methods(empty)
    write_measured(empty)
    return empty


def colors(app: Workbench) -> set[str]:
    """The colours in the screenshot that are not grey."""
    drawn = set(re.findall(r"fill[:=] ?\"?(#[0-9a-f]{6})", app.export_screenshot())) - BUTTONS
    return {color for color in drawn if Color.parse(color).hsl[1] > 0.1}


@pytest.mark.parametrize("name", SCREENS)
@pytest.mark.sampled(3)
@pytest.mark.slow
async def test_every_screen_is_drawn_without_colors(watched: Path, name: str) -> None:
    app = Workbench(watched / "params.yaml")
    app.first_screen, app.inference = name, FakeInference()
    async with app.run_test(size=(80, 24)) as pilot:
        if name == "curves":
            await until(pilot, lambda: app.screen.query_one("#chart Plot", Plot).shown)
        assert not colors(app)
        await pilot.press("tab", "tab", "down", "l", "m", "escape")
        for size in ((80, 24), (60, 16), (160, 50)):
            await pilot.resize_terminal(*size)
            await pilot.pause()
            assert not colors(app), size


DIALOGS: dict[str, Callable[[Workbench], Screen[Any]]] = {
    "help": lambda app: Reader(page(app.base_screen), "Help"),
    "messages": lambda app: Reader(partial(draw_messages, [*app.message_history]), "Messages"),
    "path": lambda _: AskText("Which folder?"),
    "sampling": lambda _: SamplingDialog({**asdict(Sampling()), "system": "", "template": "on"}),
    "ask": lambda _: Ask("finetune_lora.rank: 8 → 16", {"y": "write it"}, "Write to params.yaml"),
}


@pytest.mark.parametrize("size", [(60, 16), pytest.param((120, 40), marks=pytest.mark.slow)])
@pytest.mark.slow
async def test_every_dialog_is_drawn_without_colors(watched: Path, size: tuple[int, int]) -> None:
    app = Workbench(watched / "params.yaml")
    async with app.run_test(size=size) as pilot:
        app.log_message("a warning", "warning")
        for make in DIALOGS.values():
            app.push_screen(make(app))
            await pilot.pause()
            assert not colors(app)
            await pilot.press("escape")
        await pilot.press("ctrl+p")
        assert not colors(app)
