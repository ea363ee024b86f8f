"""Snapshots of the chat screen: empty, one model, and two with branches, thoughts and what was left
out.
"""

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from textual.pilot import Pilot

from tests.helpers.fake_engine import FakeInference
from tests.helpers.pilot import until
from tests.tui.screens.chat.test_chat import Session
from tui.app import Workbench

pytestmark = pytest.mark.usefixtures("no_path")
SIZES = pytest.mark.parametrize("size", [(80, 24), (120, 40)], ids=["80x24", "120x40"])
Snap = Callable[..., bool]
THOUGHT = (
    "<think>\nThe user asks which currency Bulgaria has. It joined the euro area in "
    "2026.\n</think>\n\n",
    "Bulgaria uses the euro since 1 January 2026.\n\n- before: the lev\n- fixed rate: 1.95583 lev "
    "to the euro",
)


@pytest.fixture(autouse=True)
def same_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The header tells the machine's memory and what of the project changed: neither belongs
    here.
    """
    monkeypatch.setattr("tui.services.machine.readings.Machine.summary", lambda _: "cpu 1.1/8 GiB")
    monkeypatch.setattr("tui.app.describe_state", lambda *_: ("✓", "✓", ""))


def compare(
    snap: Snap,
    root: Path,
    size: tuple[int, int],
    run: Callable[[Session], Awaitable[None]],
    tokens: tuple[str, ...],
) -> bool:
    app, engine = Workbench(root / "params.yaml"), FakeInference()
    engine.chat, engine.tokens = True, tokens
    app.inference, app.first_screen = engine, "chat"

    async def run_before(pilot: Pilot[None]) -> None:
        session = Session(pilot, engine)
        await until(pilot, lambda: session.screen.session.entries)
        await run(session)

    return snap(app, terminal_size=size, run_before=run_before)


@SIZES
def test_empty(snap_compare: Snap, brief: Path, size: tuple[int, int]) -> None:
    async def run(_: Session) -> None:
        pass

    assert compare(snap_compare, brief, size, run, THOUGHT)


@SIZES
def test_one_model(snap_compare: Snap, brief: Path, size: tuple[int, int]) -> None:
    async def run(s: Session) -> None:
        await s.ask("Which currency has Bulgaria?")
        await s.press("ctrl+t")
        await s.write("And Japan?")

    assert compare(snap_compare, brief, size, run, THOUGHT)


@SIZES
def test_two_models(snap_compare: Snap, brief: Path, size: tuple[int, int]) -> None:
    async def run(s: Session) -> None:
        folder = brief / "artifacts"
        s.app.go("chat", models=[folder / "lora_adapter", folder / "base"])
        await until(s.pilot, lambda: len(s.screen.session.entries) == 2)
        await s.ask("Which currency has Bulgaria?")
        s.engine.cut_messages, s.engine.tokens = 2, ("The yen.",)
        await s.ask("And Japan?")
        await s.press("ctrl+r")
        await s.quiet()
        await s.press("ctrl+down", "up", "down")

    assert compare(snap_compare, brief, size, run, THOUGHT)
