"""Pictures of the calculator: as it opens, with two pinned, and with a field that is wrong."""

from pathlib import Path
from typing import Any

import pytest

from tests.tui.support import until
from tui.app import Workbench
from tui.widgets.calc_answer import Pinned, Verdict
from tui.widgets.tab_bar import TabBar

PRESSED = {"first": [], "pinned": ["p", "right", "p"], "wrong": ["tab", "x", "escape"]}


@pytest.mark.parametrize("size", [(80, 24), (120, 40)], ids=str)
@pytest.mark.parametrize("state", PRESSED)
def test_calculator(
    empty: Path, monkeypatch: pytest.MonkeyPatch, snap_compare: Any, state: str, size: tuple[int, int]
) -> None:
    monkeypatch.setattr(TabBar, "where", "~/project", raising=False)
    app = Workbench(empty / "params.yaml")
    app.root = Path("~/project")  # the bar shows it

    async def settle(pilot: Any) -> None:
        await pilot.press("3", *PRESSED[state])
        await until(pilot, lambda: "most that fits:" in str(app.screen.query_one(Verdict).content))
        pinned = app.screen.query_one(Pinned)
        await until(pilot, lambda: state != "pinned" or "②" in str(pinned.content))

    assert snap_compare(app, terminal_size=size, run_before=settle)
