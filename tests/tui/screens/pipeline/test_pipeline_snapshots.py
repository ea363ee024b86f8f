"""Snapshots of the pipeline screen, help and messages."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import Input, Static

from pipeline.project.logs.run_state import Journal
from pipeline.project.status import StageState, State, Status
from tests.helpers.pilot import until
from tests.helpers.projects import SHIPPED, STAGES
from tui.app import Workbench
from tui.screens.pipeline.screen import PipelineScreen

pytestmark = pytest.mark.usefixtures("no_path")
SIZES = pytest.mark.parametrize("size", [(80, 24), (120, 40)], ids=str)
NOTES = ["resumed after step 100"]
RUNNING = Journal("running", 1, 0.0, done=4_200, first=4_200, total=12_000, text="loss 0.412", notes=NOTES)
FAILED = Journal("failed", 1, 0.0, message="finetune_freeze.last_blocks must be at most 2, the model's blocks, got 9.")
STATES: dict[str, tuple[State, tuple[str, ...], Journal | None]] = {
    "pretrain": ("current", (), None),
    "expand_vocab": ("current", (), None),
    "train_from_scratch": ("died", ("its process ended without a word",), None),
    "finetune_full": ("changed", ("epochs 50 → 80", "data/finetune.de.txt changed"), None),
    "finetune_freeze": ("failed", (FAILED.message,), FAILED),
    "finetune_lora": ("running", (), RUNNING),
    "finetune_sweep": ("stopped", ("finetune_sweep: stopped after step 120 of 300",), None),
    "merge": ("waits", ("after finetune_lora",), None),
    "evaluate": ("missing", (), None),
}


@pytest.fixture
def every_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage in each state. The running one shows no pace, which would differ from snapshot to snapshot."""
    states = {name: StageState(STAGES[name], *rest) for name, rest in STATES.items()}
    monkeypatch.setattr(Status, "of", lambda *_: states)


async def wait_until_loaded(pilot: Pilot[Any]) -> PipelineScreen:
    screen = pilot.app.screen
    assert isinstance(screen, PipelineScreen)
    await until(pilot, lambda: screen.states)
    await until(pilot, lambda: str(screen.query_one("#changes", Static).content))
    return screen


@SIZES
def test_empty(snap_compare: Any, empty: Path, size: tuple[int, int]) -> None:
    assert snap_compare(Workbench(empty / "params.yaml"), terminal_size=size, run_before=wait_until_loaded)


@SIZES
@pytest.mark.usefixtures("every_state")
def test_a_stage_in_each_state(snap_compare: Any, empty: Path, size: tuple[int, int]) -> None:
    async def before(pilot: Pilot[Any]) -> None:
        screen = await wait_until_loaded(pilot)
        await pilot.press(*["down"] * list(SHIPPED).index("finetune_freeze"), "l")
        await until(pilot, lambda: screen.chosen == "finetune_freeze")

    assert snap_compare(Workbench(empty / "params.yaml"), terminal_size=size, run_before=before)


@pytest.mark.parametrize("theme", ["textual-dark", "textual-light"])
@pytest.mark.usefixtures("every_state")
def test_params_of_which_one_is_wrong(snap_compare: Any, empty: Path, theme: str) -> None:
    app = Workbench(empty / "params.yaml")
    app.config = dataclasses.replace(app.config, theme=theme)

    async def before(pilot: Pilot[Any]) -> None:
        screen = await wait_until_loaded(pilot)
        for field in screen.query(Input):
            field.cursor_blink = False
        await pilot.press("enter", "tab", "tab", "x")
        await until(pilot, lambda: screen.query(".-bad"))

    assert snap_compare(app, terminal_size=(80, 24), run_before=before)


@pytest.mark.parametrize("key", ["question_mark", "f8"])
def test_help_and_messages(snap_compare: Any, empty: Path, key: str) -> None:
    async def before(pilot: Pilot[Any]) -> None:
        await wait_until_loaded(pilot)
        await pilot.press(key)
        await until(pilot, lambda: len(pilot.app.screen_stack) == 2)

    assert snap_compare(Workbench(empty / "params.yaml"), terminal_size=(80, 24), run_before=before)
