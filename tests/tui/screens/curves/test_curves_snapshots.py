"""Snapshots of the curves screen."""

from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot

from tests.helpers.run_folders import write_measured, write_methods, write_samples, write_sweep
from tests.tui.screens.curves.test_curves import wait_until_drawn
from tui.app import Workbench
from tui.screens.curves.screen import CurvesScreen, RunList

pytestmark = pytest.mark.usefixtures("no_path")
SIZES = [(80, 24), (120, 40)]


async def to_curves(pilot: Pilot[Any]) -> None:
    await pilot.press("2")
    await pilot.pause()
    assert isinstance(pilot.app.screen, CurvesScreen)
    await wait_until_drawn(pilot, pilot.app.screen)


async def show_log_scale(pilot: Pilot[Any]) -> None:
    await to_curves(pilot)
    await pilot.press("l", "c", "g")
    await pilot.pause()


@pytest.mark.parametrize("size", SIZES)
def test_empty(snap_compare: Any, empty: Path, size: tuple[int, int]) -> None:
    assert snap_compare(Workbench(empty / "params.yaml"), terminal_size=size, run_before=to_curves)


@pytest.mark.parametrize("size", SIZES)
def test_three_methods(snap_compare: Any, empty: Path, size: tuple[int, int]) -> None:
    write_methods(empty)
    assert snap_compare(Workbench(empty / "params.yaml"), terminal_size=size, run_before=to_curves)


async def show_divergence(pilot: Pilot[Any]) -> None:
    await to_curves(pilot)
    await pilot.press("c", *(["d"] if pilot.app.size.height < 36 else []))  # a tall terminal shows the panel anyway
    await pilot.pause()


@pytest.mark.parametrize("size", SIZES)
def test_evaluations_and_divergence(snap_compare: Any, empty: Path, size: tuple[int, int]) -> None:
    write_methods(empty)
    write_measured(empty, "finetune_lora")
    write_measured(empty, "finetune_full", every=6)
    assert snap_compare(Workbench(empty / "params.yaml"), terminal_size=size, run_before=show_divergence)


@pytest.mark.parametrize("theme", ["textual-dark", "textual-light"])
def test_log_cursor_and_a_panel(snap_compare: Any, empty: Path, theme: str) -> None:
    write_methods(empty)
    app = Workbench(empty / "params.yaml")
    app.state.theme = theme
    assert snap_compare(app, terminal_size=(120, 40), run_before=show_log_scale)


async def expand_sweep(pilot: Pilot[Any]) -> None:
    """Expand the sweep and highlight its second adapter."""
    await to_curves(pilot)
    pilot.app.screen.set_focus(pilot.app.screen.query_one(RunList))
    await pilot.press("down", "down", "down", "enter")
    await pilot.pause()
    await pilot.press("down", "down")
    await pilot.pause()


@pytest.mark.parametrize("size", SIZES)
def test_a_sweep(snap_compare: Any, empty: Path, size: tuple[int, int]) -> None:
    write_methods(empty)
    losses = {f"rank-{rank}_lr-{rate}": 2.0 + rank + rate * 1e3 for rank in (2, 4) for rate in (0.001, 0.002)}
    write_sweep(empty, losses, {"rank-2_lr-0.002": ("stopped early", 180), "rank-4_lr-0.002": ("diverged", 40)})
    assert snap_compare(Workbench(empty / "params.yaml"), terminal_size=size, run_before=expand_sweep)


async def show_samples(pilot: Pilot[Any]) -> None:
    await to_curves(pilot)
    await pilot.press("s")
    await pilot.pause()


@pytest.mark.parametrize("size", SIZES)
def test_samples(snap_compare: Any, empty: Path, size: tuple[int, int]) -> None:
    write_methods(empty)
    for stage, answer in (("finetune_lora", "der euro"), ("finetune_full", "der euro und der lewa")):
        write_samples(empty / "runs" / stage, {150: "der lewa", 300: answer})
    assert snap_compare(Workbench(empty / "params.yaml"), terminal_size=size, run_before=show_samples)
