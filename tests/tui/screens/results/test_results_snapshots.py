"""Snapshots of the Results screen."""

from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot

from tests.helpers.json_files import write_json
from tests.helpers.pilot import until
from tui.app import Workbench
from tui.screens.results.screen import ResultsScreen

pytestmark = pytest.mark.usefixtures("no_path")
SIZES = [pytest.param((80, 24), id="80x24"), pytest.param((120, 40), id="120x40")]
NUMBERS = {
    "parameters": 1000,
    "bytes": 40_000,
    "old_loss": 1.0,
    "new_sentences": 8,
    "trainable": 100,
}


def task(score: float, low: float, high: float) -> dict[str, Any]:
    change = {"score": score - 1, "low": low - 1, "high": high - 1}
    return {
        "tasks": {
            "capitals": {"score": score, "low": low, "high": high, "n": 9, "difference": change}
        }
    }


def model(done: int, kept: float, **more: Any) -> dict[str, Any]:
    """Numbers that no training gives twice on two machines, so they are written here."""
    forgetting = {"answers_kept": kept, "loss_rise": 1 - kept, "divergence": 1 - kept}
    share = {
        "trainable_percent": 10.0,
        "new_loss": 1.0 - done / 10,
        "new_completed": done,
        "forgetting": forgetting,
    }
    return {**NUMBERS, **share, **more}


@pytest.fixture(autouse=True)
def no_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its memory is another in each picture."""
    monkeypatch.setattr("tui.services.machine.readings.Machine.summary", lambda _: "")


@pytest.fixture
def evaluated(empty: Path) -> Path:
    """A project with an evaluation, a broken limit, and a sweep."""

    broken = [{"variant": "full", "limit": "answers_kept", "wanted": 0.7, "value": 0.6}]
    metrics = {
        "base": {**model(0, 1.0, **task(1, 1, 1))},
        "scratch": model(8, 0.91, **task(0.9, 0.7, 1)),
        "full": model(8, 0.6, **task(0.4, 0.1, 0.7)),
        "lora": model(8, 0.73, **task(0.7, 0.4, 0.9)),
        "prefix": model(0, 0.42, **task(0.3, 0.1, 0.6)),
        "gate": {"passed": False, "variants": ["full", "lora", "prefix"], "broken": broken},
    }
    rows = {
        f"rank-{rank}": {
            "values": {"rank": rank},
            **{
                "state": "done",
                "trainable": 100 * rank,
                "steps": 9,
                "final_loss": loss,
                "eval_loss": loss,
            },
            "divergence": divergence,
        }
        for rank, loss, divergence in (
            (1, 0.9, 0.01),
            (4, 0.7, 0.03),
            (16, 0.6, 0.2),
            (64, 0.65, 0.4),
        )
    }
    for name, tree in (("evaluation/metrics.json", metrics), ("sweep/sweep.json", rows)):
        path = empty / "artifacts" / name
        path.parent.mkdir(parents=True)
        write_json(path, tree)
    return empty


def shown(*keys: str) -> Any:
    async def run(pilot: Pilot[Any]) -> None:
        await pilot.press("3")
        await pilot.pause()
        screen = pilot.app.screen
        assert isinstance(screen, ResultsScreen)
        await until(pilot, lambda: screen.seen is not None)
        await pilot.press(*keys)
        await pilot.pause()

    return run


@pytest.mark.parametrize("size", SIZES)
def test_methods(snap_compare: Any, evaluated: Path, size: tuple[int, int]) -> None:
    assert snap_compare(
        Workbench(evaluated / "params.yaml"), terminal_size=size, run_before=shown()
    )


@pytest.mark.parametrize("size", SIZES)
def test_sweep(snap_compare: Any, evaluated: Path, size: tuple[int, int]) -> None:
    assert snap_compare(
        Workbench(evaluated / "params.yaml"), terminal_size=size, run_before=shown("w")
    )


def test_light(snap_compare: Any, evaluated: Path) -> None:
    app = Workbench(evaluated / "params.yaml")
    app.theme = "lora-light"
    assert snap_compare(app, terminal_size=(120, 40), run_before=shown())


def test_nothing_yet(snap_compare: Any, empty: Path) -> None:
    assert snap_compare(
        Workbench(empty / "params.yaml"), terminal_size=(80, 24), run_before=shown()
    )
