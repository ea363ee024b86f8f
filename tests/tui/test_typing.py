"""Keys typed faster than they are handled: each has the effect that it has when typed slowly."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from textual.events import Key, Paste
from textual.pilot import Pilot
from textual.widgets import TextArea

from tests.helpers.fake_engine import FakeInference
from tests.helpers.pilot import screen_opens, until
from tests.helpers.projects import load
from tui.app import Workbench
from tui.screens.conversation.field import MessageField
from tui.screens.models.screen import ModelsScreen
from tui.screens.pipeline.screen import PipelineScreen


def burst(pilot: Pilot[Any], *keys: str) -> None:
    """Post all keys at once, as a slow connection delivers them."""
    for key in keys:
        pilot.app.post_message(Key(key, key if len(key) == 1 else None))


@asynccontextmanager
async def at_the_prompt(root: Path) -> AsyncIterator[tuple[Pilot[None], TextArea]]:
    """The app with the focus in the prompt field."""
    app = Workbench(root / "params.yaml")
    app.inference = FakeInference()
    async with app.run_test() as pilot:
        app.go("models", prompt=" ")
        await until(pilot, lambda: isinstance(app.focused, MessageField))
        assert isinstance(app.focused, MessageField)
        app.focused.text = ""
        yield pilot, app.focused


async def test_a_line_that_is_cleared_and_typed_again(empty: Path) -> None:
    async with at_the_prompt(empty) as (pilot, field):
        burst(pilot, *"abc", "ctrl+u", *"def")
        await until(pilot, lambda: field.text == "def", 5)
        burst(pilot, *"gh", "home", *"x", "end", "backspace", *"yz")
        await until(pilot, lambda: field.text == "xdefgyz", 5)


@pytest.mark.slow
async def test_a_param_is_written_from_keys_typed_ahead(empty: Path) -> None:
    app = Workbench(empty / "params.yaml")
    async with app.run_test() as pilot:
        screen = app.screen
        assert isinstance(screen, PipelineScreen)
        await until(pilot, lambda: screen.params.fields)
        down = ["down"] * [row.key for row in screen.rows.shown].index("finetune_lora")
        burst(
            pilot,
            *down,
            "enter",
            "enter",
            "ctrl+u",
            *"12",
            "enter",
            "down",
            "enter",
            *"24",
            "enter",
            "2",
        )
        await until(pilot, lambda: getattr(app.screen, "NAME", "") == "curves", 20)
        section = load(empty / "params.yaml").finetune_lora
        assert (section.rank, section.alpha) == (12, 24)


async def test_numbers_of_the_sampling_dialog_land_in_their_fields(empty: Path) -> None:
    app = Workbench(empty / "params.yaml")
    app.first_screen, app.inference = "models", FakeInference()
    async with app.run_test(size=(120, 40)) as pilot:
        screen = await screen_opens(pilot, ModelsScreen)
        burst(
            pilot,
            "ctrl+l",
            *"0.7",
            "tab",
            *"5",
            "tab",
            *"0.9",
            "tab",
            *"3",
            "tab",
            *"40",
            "tab",
            *"7",
            "enter",
            "1",
        )
        await screen_opens(pilot, PipelineScreen, 20)
        assert (
            str(screen.session.sampling)
            == "temperature 0.7 · top-k 5 · top-p 0.9 · seed 3 · 40 tokens · 7 candidates"
        )


async def test_a_paste_waits_for_the_keys_before_it(empty: Path) -> None:
    async with at_the_prompt(empty) as (pilot, field):
        burst(pilot, *"abc", "ctrl+u")
        pilot.app.post_message(Paste("pasted"))
        burst(pilot, "home", "x")
        await until(pilot, lambda: field.text == "xpasted", 5)


async def test_a_widget_that_hangs_does_not_take_the_keyboard_with_it(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tui.app.KEY_PATIENCE", 0.05)
    app = Workbench(empty / "params.yaml")
    async with app.run_test() as pilot:
        screen = await screen_opens(pilot, PipelineScreen)
        await until(pilot, lambda: screen.rows.has_focus)
        go_on = asyncio.Event()
        screen.rows.call_later(go_on.wait)
        burst(pilot, "m")  # lost in the queue of the list, which has the focus
        await asyncio.sleep(0.02)
        app.screen.set_focus(None)
        burst(pilot, "2")
        await until(pilot, lambda: getattr(app.screen, "NAME", "") == "curves", 10)
        go_on.set()
