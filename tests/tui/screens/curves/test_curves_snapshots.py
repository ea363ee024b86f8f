"""Snapshots of the curves screen."""

import os
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot

from tests.helpers.curves import point_to, wait_until_drawn
from tests.helpers.run_folders import write_measured, write_methods, write_samples, write_sweep
from tui.app import Workbench
from tui.screens.curves.screen import CurvesScreen

pytestmark = pytest.mark.usefixtures("no_path")
SIZES = [pytest.param((80, 24), id="80x24"), pytest.param((120, 40), id="120x40")]
WHEN = 1_700_000_000  # of the logs, so that the day beside a run is always the same


async def to_curves(pilot: Pilot[Any]) -> CurvesScreen:
    await pilot.press("2")
    await pilot.pause()
    screen = pilot.app.screen
    assert isinstance(screen, CurvesScreen)
    await wait_until_drawn(pilot, screen)
    return screen


async def with_cursor(pilot: Pilot[Any]) -> None:
    """The step cursor on the run with evaluations."""
    screen = await to_curves(pilot)
    await point_to(pilot, screen, "lora")
    await pilot.press(*["left"] * 12)
    await pilot.pause()


async def opened(pilot: Pilot[Any]) -> None:
    """The second adapter of the sweep."""
    screen = await to_curves(pilot)
    await point_to(pilot, screen, "sweep")
    await pilot.press("enter")
    await pilot.pause()
    await pilot.press("down", "down")
    await pilot.pause()


def dated(root: Path) -> Path:
    for log in root.glob("runs/**/loss.csv"):
        os.utime(log, (WHEN, WHEN))
    return root


def workbench(root: Path) -> Workbench:
    return Workbench(dated(root) / "params.yaml")


async def settled(pilot: Pilot[Any]) -> None:
    await to_curves(pilot)


def test_empty(snap_compare: Any, empty: Path) -> None:
    assert snap_compare(workbench(empty), terminal_size=(80, 24), run_before=settled)


@pytest.mark.parametrize("size", SIZES)
def test_methods_evaluations_answers_and_the_cursor(
    snap_compare: Any, empty: Path, size: tuple[int, int]
) -> None:
    write_methods(empty)
    write_measured(empty, "finetune_lora")
    for stage, answer in (
        ("finetune_lora", "der euro"),
        ("finetune_full", "der euro und der lewa"),
    ):
        write_samples(empty / "runs" / stage, {150: "der lewa", 300: answer})
    assert snap_compare(workbench(empty), terminal_size=size, run_before=with_cursor)


@pytest.mark.parametrize("size", SIZES)
def test_a_sweep(snap_compare: Any, empty: Path, size: tuple[int, int]) -> None:
    write_methods(empty)
    losses = {
        f"rank-{rank}_lr-{rate}": 2.0 + rank + rate * 1e3
        for rank in (2, 4)
        for rate in (0.001, 0.002)
    }
    write_sweep(
        empty,
        losses,
        {"rank-2_lr-0.002": ("stopped early", 180), "rank-4_lr-0.002": ("diverged", 40)},
    )
    assert snap_compare(workbench(empty), terminal_size=size, run_before=opened)


def test_light(snap_compare: Any, empty: Path) -> None:
    async def light(pilot: Pilot[Any]) -> None:
        pilot.app.theme = "textual-light"
        await to_curves(pilot)

    write_methods(empty)
    assert snap_compare(workbench(empty), terminal_size=(120, 40), run_before=light)
