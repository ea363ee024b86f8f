"""Pictures of the data screen."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot

from tests.helpers.chat_projects import new_chat_project
from tests.helpers.pilot import screen_opens, until
from tui.app import Workbench
from tui.screens.data.editor import Editor
from tui.screens.data.screen import DataScreen

pytestmark = pytest.mark.usefixtures("forked_processes")
SIZES = [(80, 24), (120, 40)]
NAMES = ["80x24", "120x40"]
TURNS = [
    ("Where is Sofia?", "In the west of Bulgaria, below a mountain."),
    ("And Varna?", "By the sea."),
    ("Which currency has Bulgaria?", "The euro, since 2026."),
]


def rows() -> list[str]:
    """Conversations of one to three turns, a broken row, and a repeated one."""
    lines = []
    for n in range(40):
        messages: list[Any] = []
        for asked, answered in [TURNS[(n + k) % 3] for k in range(1 + n % 3)]:
            messages += [
                {"role": "user", "content": asked},
                {"role": "assistant", "content": f"{answered} ({n})"},
            ]
        lines.append(json.dumps({"messages": messages}))
    lines[4] = '{"messages": [{"role": "user", "content": '
    lines[7] = lines[6]
    return lines


@pytest.fixture
def chat_project(tmp_path: Path) -> Path:
    return new_chat_project(tmp_path / "project", "\n".join(rows()), 999)


@pytest.fixture(autouse=True)
def still_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """No memory of this machine in the header."""
    monkeypatch.setattr("tui.services.machine.readings.Machine.summary", lambda _: "cpu 1/8 GiB")


async def read_to_the_end(pilot: Pilot[Any]) -> DataScreen:
    screen = pilot.app.screen
    assert isinstance(screen, DataScreen)
    await until(pilot, lambda: screen.row.row and screen.row.row["event"] == "done")
    await until(pilot, lambda: str(screen.report.problems.nothing) == "✓ none")
    return screen


@pytest.mark.usefixtures("no_path")
@pytest.mark.parametrize("size", SIZES, ids=NAMES)
def test_a_conversation_that_is_cut(
    chat_project: Path, size: tuple[int, int], snap_compare: Callable[..., bool]
) -> None:
    async def go(pilot: Pilot[Any]) -> None:
        screen = await read_to_the_end(pilot)
        screen.rows.table.go_to(2)
        await until(pilot, lambda: screen.row.row and screen.row.row["row"] == 3)

    app = Workbench(chat_project / "params.yaml")
    app.first_screen = "data"
    assert snap_compare(app, run_before=go, terminal_size=size)


@pytest.mark.usefixtures("no_path")
def test_the_editor(chat_project: Path, snap_compare: Callable[..., bool]) -> None:
    async def go(pilot: Pilot[Any]) -> None:
        screen = await read_to_the_end(pilot)
        screen.open_with(add=json.loads(rows()[0]))
        await screen_opens(pilot, Editor)
        await until(pilot, lambda: "tokens" in str(pilot.app.screen.query_one("#reading").render()))

    app = Workbench(chat_project / "params.yaml")
    app.first_screen = "data"
    assert snap_compare(app, run_before=go, terminal_size=(100, 30))
