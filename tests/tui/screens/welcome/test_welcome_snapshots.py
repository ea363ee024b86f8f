"""Pictures of the first look."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot

from tui.app import Workbench
from tui.screens.welcome.screen import CHOICES

pytestmark = pytest.mark.usefixtures("no_path")


@pytest.fixture(autouse=True)
def number(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calculator's, whatever screens there are."""
    monkeypatch.setitem(CHOICES, "calculate", ("7", *CHOICES["calculate"][1:]))


@pytest.mark.parametrize("size", [(80, 24), (120, 40)], ids=["80x24", "120x40"])
def test_welcome(size: tuple[int, int], tmp_path: Path, snap_compare: Callable[..., bool]) -> None:
    async def still(pilot: Pilot[Any]) -> None:
        await pilot.press("down")

    assert snap_compare(Workbench(tmp_path / "params.yaml"), still, terminal_size=size)


def test_new_project(tmp_path: Path, snap_compare: Callable[..., bool]) -> None:
    async def still(pilot: Pilot[Any]) -> None:
        await pilot.press("n")
        await pilot.pause()

    assert snap_compare(Workbench(tmp_path / "params.yaml"), still, terminal_size=(80, 24))
