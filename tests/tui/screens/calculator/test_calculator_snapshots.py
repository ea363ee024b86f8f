"""Pictures of the calculator: as it opens, with two pinned, too large, with two wrong fields, and
what is written.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.pilot import until
from tui.app import Workbench
from tui.dialogs import Ask
from tui.screens.calculator.screen import CalculatorScreen

PRESSED = {
    "first": [],
    "pinned": ["ctrl+t", "right", "ctrl+t"],
    "too-large": ["left", "left"],
    "wrong": ["tab", "x", "tab", "y"],
    "write": ["tab", "+", "ctrl+s"],
}
SIZES = {"80x24": (80, 24), "120x40": (120, 40)}


@pytest.mark.usefixtures("no_path")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("state", PRESSED)
def test_calculator(empty: Path, snap_compare: Any, state: str, size: str) -> None:
    app = Workbench(empty / "params.yaml")
    app.first_screen = "calculator"

    async def settle(pilot: Any) -> None:
        screen = app.screen
        assert isinstance(screen, CalculatorScreen)
        await pilot.press(*PRESSED[state])
        await until(
            pilot, lambda: screen.result and not screen.query_one("#answers").has_class("-old")
        )
        await until(pilot, lambda: state != "write" or isinstance(app.screen, Ask))

    assert snap_compare(app, terminal_size=SIZES[size], run_before=settle)
