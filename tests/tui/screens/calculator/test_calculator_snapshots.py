"""Pictures of the calculator: as it opens, with two pinned, and with a field that is wrong."""

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.pilot import until
from tui.app import Workbench
from tui.widgets.text import Lines

PRESSED = {"first": [], "pinned": ["p", "right", "p"], "wrong": ["tab", "x", "escape"]}


@pytest.mark.usefixtures("no_path")
@pytest.mark.parametrize("size", [(80, 24), (120, 40)], ids=str)
@pytest.mark.parametrize("state", PRESSED)
def test_calculator(empty: Path, snap_compare: Any, state: str, size: tuple[int, int]) -> None:
    app = Workbench(empty / "params.yaml")

    async def settle(pilot: Any) -> None:
        await pilot.press("3", *PRESSED[state])
        await until(pilot, lambda: "most that fits:" in str(app.screen.query_one("#verdict", Lines).content))
        pinned = app.screen.query_one("#pinned", Lines)
        await until(pilot, lambda: state != "pinned" or "②" in str(pinned.content))

    assert snap_compare(app, terminal_size=size, run_before=settle)
