"""The dialog of the sampling returns what was typed once it is valid, or nothing."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Any

import pytest
from textual.app import App
from textual.pilot import Pilot
from textual.widgets import TextArea

from tests.helpers.pilot import until
from tui.panes.form import Form
from tui.screens.conversation.sampling import Sampling, SamplingDialog

NOTHING = object()


@asynccontextmanager
async def asked(
    size: tuple[int, int] = (100, 30), **options: Any
) -> AsyncIterator[tuple[Pilot[None], SamplingDialog, list[Any]]]:
    app, answers = App[None](), list[Any]()
    dialog = SamplingDialog({**asdict(Sampling()), **options})
    async with app.run_test(size=size) as pilot:
        await app.push_screen(dialog, answers.append)
        await pilot.pause()
        yield pilot, dialog, answers


async def input_is_on(pilot: Pilot[None], form: Form, line: int) -> None:
    await until(pilot, lambda: form.input.region.y - form.region.y == line)


async def test_what_is_typed_into_each_field_is_returned() -> None:
    async with asked() as (pilot, dialog, answers):
        for line, text in enumerate(("0.7", "5", "0.9", "3", "40")):
            await input_is_on(pilot, dialog.form, line)
            await pilot.press(*text, "tab")
        await pilot.press("7", "enter")
        assert Sampling(**answers[0]) == Sampling(0.7, 5, 0.9, 3, 40, 7)


async def test_the_rules_are_beside_the_fields_and_a_wrong_value_is_not_used() -> None:
    async with asked() as (pilot, dialog, answers):
        assert any("above 0 up to 1" in line for line in dialog.form.lines())
        await pilot.press("tab", "tab", *"1.5", "tab", "enter")
        assert not answers and dialog.form.key == "top_p"
        shown = " ".join(" ".join(dialog.form.lines()).split())
        assert "✗ top-p must be above 0 up to 1 (1 cuts nothing), got '1.5'." in shown
        await pilot.press("escape")
        assert answers == [None]


@pytest.mark.parametrize("text", ["", "x", "nan", "-1", "1e400", "٣"])
async def test_garbage_is_not_used(text: str) -> None:
    async with asked() as (pilot, dialog, answers):
        dialog.form.put("temperature", text)
        await pilot.press("ctrl+s")
        assert not answers


async def test_the_system_prompt_and_the_template_are_asked_for_where_there_are_any() -> None:
    async with asked(system="Be brief.", template="on") as (pilot, dialog, answers):
        assert isinstance(dialog.focused, TextArea)
        await pilot.press("end", *" Yes.", "tab", *["down"] * 6)
        assert dialog.form.key == "template"
        await pilot.press("right", "ctrl+s")
        expected = {**asdict(Sampling()), "system": "Be brief. Yes.", "template": "off"}
        assert answers == [expected]


@pytest.mark.parametrize("size", [(30, 8), (80, 24), (200, 60)], ids=str)
async def test_it_is_drawn_at_every_size(size: tuple[int, int]) -> None:
    async with asked(size, system="", template="off") as (pilot, _, answers):
        await pilot.press("tab", *["down"] * 7, "left", "ctrl+s")
        assert answers[0]["template"] == "on"
