"""Fixtures: the app on a project, with the user's config and state in a temporary home."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot

from tests.support import new_project


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where config and state are: nothing of the developer's own is read or written."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("COLORFGBG", raising=False)
    return tmp_path


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """A project of which nothing is made yet."""
    return new_project(tmp_path / "empty")


@pytest.fixture
def no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar shows the same folder on every machine: for pictures."""
    monkeypatch.setattr("tui.app._short", lambda _: "~/project")


@pytest.fixture
def snap_compare(snap_compare: Callable[..., bool]) -> Callable[..., bool]:
    """The plugin's, but it waits until the picture no longer changes: on a busy machine the layout takes a moment."""

    def compare(app: object, run_before: Callable[[Pilot[Any]], Awaitable[None]], **how: Any) -> bool:
        async def still(pilot: Pilot[Any]) -> None:
            await run_before(pilot)
            picture, before = pilot.app.export_screenshot(), ""
            async with asyncio.timeout(60):
                while picture != before:
                    await asyncio.sleep(0.1)
                    await pilot.pause()
                    picture, before = pilot.app.export_screenshot(), picture

        return snap_compare(app, run_before=still, **how)

    return compare
