"""Fixtures: the app on a project, with the user's config and state in a temporary home."""

import asyncio
import sys
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from textual.css.stylesheet import Stylesheet
from textual.pilot import Pilot
from textual.widgets import Input, TextArea

from tests.helpers.pilot import idle
from tests.helpers.process import forked, listening
from tests.helpers.projects import new_project
from tests.helpers.run_folders import write_methods


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Config and state in a temporary folder, so that the developer's own are not touched."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("COLORFGBG", raising=False)
    return tmp_path


@pytest.fixture(autouse=True)
def prompt_pilot(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pilot continues as soon as the app is idle; Textual's own check sleeps 40 ms or more after
    each key.
    """
    monkeypatch.setattr("textual.app.wait_for_idle", idle)
    monkeypatch.setattr("textual.pilot.wait_for_idle", idle)


@pytest.fixture
def held_threads(prompt_pilot: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001  # replaced here
    """Pilot continues after a second: for tests whose threads wait for the test, so that the app is
    never idle.
    """
    monkeypatch.setattr("textual.app.wait_for_idle", partial(idle, most=1.0))
    monkeypatch.setattr("textual.pilot.wait_for_idle", partial(idle, most=1.0))


@pytest.fixture(autouse=True, scope="session")
def parsed_once() -> Iterator[None]:
    """Cache parsed styles: Textual parses all of them for each app and each dialog."""
    parse, cache = Stylesheet._parse_rules, dict[object, Any]()

    def parsed(sheet: Stylesheet, css: str, read_from: Any, *how: Any, **named: Any) -> Any:
        key = (css, read_from, how, *named.items(), *sheet._variables.items())
        if key not in cache:
            cache[key] = parse(sheet, css, read_from, *how, **named)
        return cache[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stylesheet, "_parse_rules", parsed)
        yield


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changed files are shown at once, even on a busy machine."""
    monkeypatch.setattr("tui.app.TICK", 0.1)
    monkeypatch.setattr("tui.services.project_watch.BUSY", 0.1)
    monkeypatch.setattr("tui.services.watch.STEP", 20)
    monkeypatch.setattr("tui.services.watch.STARTED", 50)
    monkeypatch.setattr("tui.services.watch.PAUSE", 0.05)
    monkeypatch.setattr("tui.screens.curves.screen.DELAY", 0.0)


@pytest.fixture
def forked_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """`python -m MODULE` runs in a child of a process that has imported torch and the tokenizers
    already.
    """
    # now: Textual's stderr is none that a process can have
    start, _ = asyncio.create_subprocess_exec, listening()

    async def started(*command: str, **how: Any) -> asyncio.subprocess.Process:
        python, *words = (word for word in command if word != "-P")
        if python == sys.executable and words[0] == "-m":
            command = tuple(forked(*words[1:]))
        return await start(*command, **how)

    monkeypatch.setattr(asyncio, "create_subprocess_exec", started)


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """A project without artifacts."""
    return new_project(tmp_path / "empty")


@pytest.fixture
def three_runs(empty: Path) -> Path:
    """`empty` with the runs of three methods."""
    write_methods(empty)
    return empty


@pytest.fixture
def no_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The header shows the same folder and memory on every machine: for snapshots."""
    monkeypatch.setattr("tui.app.from_home", lambda _: "~/project")
    monkeypatch.setattr("tui.services.machine.readings.Machine.summary", lambda _: "cpu 2.4/24 GiB")


@pytest.fixture
def snap_compare(
    snap_compare: Callable[..., bool], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., bool]:
    """The plugin's fixture, but the cursor does not blink, and it waits until the screen no longer
    changes.
    """
    for widget in (Input, TextArea):
        monkeypatch.setattr(widget.cursor_blink, "_default", False)

    def compare(
        app: object, run_before: Callable[[Pilot[Any]], Awaitable[None]], **how: Any
    ) -> bool:
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
