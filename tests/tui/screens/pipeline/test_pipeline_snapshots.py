"""Snapshots of the pipeline screen."""

from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot

from pipeline.project.logs.run_state import Journal
from pipeline.views.stages import StageState, State, Status
from tests.helpers.pilot import until
from tests.helpers.pipeline_screen import title
from tests.helpers.projects import STAGES
from tui.app import Workbench
from tui.screens.pipeline.screen import PipelineScreen

pytestmark = pytest.mark.usefixtures("no_path", "same_time")
SIZES = pytest.mark.parametrize("size", [(80, 24), (120, 40)], ids=str)
NOTES = ["resumed after step 100"]
DONE = Journal("done", 1, 0.0, done=300, total=300, text="loss 0.1", ended=9.0)
RUNNING = Journal(
    "running",
    1,
    0.0,
    done=4_200,
    first=4_200,
    total=12_000,
    text="loss 0.412",
    notes=NOTES,
    past=65.0,
)
FAILED = Journal(
    "failed",
    1,
    0.0,
    message="finetune_freeze.last_blocks must be at most 2, the model's blocks, got 9.",
    ended=1.0,
)
STATES: dict[str, tuple[State, tuple[str, ...], Journal | None]] = {
    "pretrain": ("current", (), DONE),
    "expand_vocab": ("current", (), DONE),
    "train_from_scratch": ("died", ("the process died (no error recorded)",), None),
    "finetune_full": ("changed", ("epochs 50 → 80", "data/finetune.de.txt changed"), DONE),
    "finetune_freeze": ("failed", (FAILED.message,), FAILED),
    "finetune_lora": ("running", (), RUNNING),
    "finetune_sweep": ("stopped", ("finetune_sweep: stopped after step 120 of 300",), None),
    "merge": ("waits", ("after finetune_lora",), DONE),
    "evaluate": ("missing", (), None),
}


@pytest.fixture
def every_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage in each state."""
    states = {name: StageState(STAGES[name], *rest) for name, rest in STATES.items()}
    monkeypatch.setattr(Status, "of", lambda *_: states)


@pytest.fixture
def same_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments are shown in the time zone of the machine, and the machine's load in the header."""
    monkeypatch.setenv("TZ", "UTC")
    monkeypatch.setattr("tui.widgets.header.duration", lambda _: "0:12")
    monkeypatch.setattr("tui.services.machine.readings.Machine.summary", lambda _: "")


async def wait_until_loaded(pilot: Pilot[Any]) -> PipelineScreen:
    screen, watch = pilot.app.screen, pilot.app.project_watch  # type: ignore[attr-defined]  # it is a Workbench
    assert isinstance(screen, PipelineScreen)
    await until(pilot, lambda: len(watch.states) in (len(watch.stages), len(STATES)))
    return screen


@SIZES
def test_empty(snap_compare: Any, empty: Path, size: tuple[int, int]) -> None:
    assert snap_compare(
        Workbench(empty / "params.yaml"), terminal_size=size, run_before=wait_until_loaded
    )


@SIZES
@pytest.mark.parametrize("stage", ["finetune_lora", "finetune_freeze"])
@pytest.mark.usefixtures("every_state")
def test_a_stage_in_each_state(
    snap_compare: Any, empty: Path, size: tuple[int, int], stage: str
) -> None:
    async def before(pilot: Pilot[Any]) -> None:
        screen = await wait_until_loaded(pilot)
        screen.open_with(stage=stage)
        await until(pilot, lambda: title(screen, "facts").startswith(f"{stage} "))

    assert snap_compare(Workbench(empty / "params.yaml"), terminal_size=size, run_before=before)


@pytest.mark.parametrize("theme", ["lora-dark", "lora-light"])
@pytest.mark.usefixtures("every_state")
def test_a_param_that_is_wrong(snap_compare: Any, empty: Path, theme: str) -> None:
    app = Workbench(empty / "params.yaml")
    app.theme = theme

    async def before(pilot: Pilot[Any]) -> None:
        screen = await wait_until_loaded(pilot)
        screen.open_with(stage="finetune_lora", param="rank")
        await until(pilot, lambda: screen.params.key == "rank" and screen.params.has_focus)
        await pilot.press("enter", "0")

    assert snap_compare(app, terminal_size=(120, 40), run_before=before)
