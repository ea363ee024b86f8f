"""Fixtures: the app on a project, with the user's config and state in a temporary home."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from textual.css.stylesheet import Stylesheet
from textual.pilot import Pilot

from tests.helpers.pilot import idle
from tests.helpers.projects import new_project


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where config and state are: nothing of the developer's own is read or written."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("COLORFGBG", raising=False)
    return tmp_path


@pytest.fixture(autouse=True)
def prompt_pilot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pilot goes on as soon as the app is idle: Textual's own way to tell sleeps 40 ms or more after each key."""
    monkeypatch.setattr("textual.app.wait_for_idle", idle)
    monkeypatch.setattr("textual.pilot.wait_for_idle", idle)


@pytest.fixture(autouse=True, scope="session")
def parsed_once() -> Iterator[None]:
    """Textual parses all its styles for each app, and again for each dialog: here once."""
    parse, known = Stylesheet._parse_rules, dict[object, Any]()

    def parsed(sheet: Stylesheet, css: str, read_from: Any, *how: Any, **named: Any) -> Any:
        key = (css, read_from, how, *named.items(), *sheet._variables.items())
        if key not in known:
            known[key] = parse(sheet, css, read_from, *how, **named)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stylesheet, "_parse_rules", parsed)
        yield


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Screens look at files several times a second, and draw what they see at once, however busy the machine is."""
    monkeypatch.setattr("tui.screens.pipeline.screen.TICK", 0.1)
    monkeypatch.setattr("tui.screens.curves.screen.POLL", 0.1)
    monkeypatch.setattr("tui.screens.curves.screen.LATEST", 0.0)
    monkeypatch.setattr("tui.screens.adapters.browser.EVERY", 0.3)
    monkeypatch.setattr("tui.screens.adapters.screen.STATUS_EVERY", 0.1)


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
