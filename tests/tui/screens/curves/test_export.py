"""What is exported: pictures of what is on the screen, numbers of the runs that are on."""

import csv
import errno
from pathlib import Path
from typing import Any

import pytest
from textual.widgets import Input

from pipeline.project.logs.run_log import read_steps
from tests.helpers.curves import open_curves, save_as
from tests.helpers.pilot import until
from tests.helpers.run_folders import write_measured, write_methods
from tui.dialogs import Ask, PathScreen
from tui.screens.curves import export
from tui.screens.curves.screen import CurvesScreen


@pytest.fixture
def root(empty: Path) -> Path:
    write_methods(empty)
    return empty


def picture(screen: CurvesScreen) -> dict[str, Any]:
    return {"format": "svg", "title": "", "x": screen.steps(), "panels": screen.panels()}


async def test_csv_has_every_row_of_the_visible_runs(root: Path) -> None:
    async with open_curves(root) as (pilot, screen):
        await save_as(pilot, "all.csv")
        await until(pilot, lambda: (root / "all.csv").exists())
        assert isinstance(pilot.app.screen, CurvesScreen), screen
    with (root / "all.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    steps = read_steps(root / "runs/finetune_lora/loss.csv")
    ours = [row for row in rows if row["run"] == "finetune_lora"]
    assert [
        (int(r["step"]), int(r["epoch"]), float(r["loss"]), int(r["tokens"])) for r in ours
    ] == [(step.step, step.epoch, step.loss, step.tokens) for step in steps]
    assert len(rows) == 3 * len(steps)


async def test_csv_has_the_optional_columns_of_the_runs_that_have_them(root: Path) -> None:
    folder = write_measured(root)
    async with open_curves(root) as (pilot, _):
        await save_as(pilot, "all.csv")
        await until(pilot, lambda: (root / "all.csv").exists())
    with (root / "all.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    ours = [(r["eval_loss"], r["divergence"]) for r in rows if r["run"] == "finetune_lora"]
    assert [tuple(float(cell) if cell else None for cell in row) for row in ours] == [
        (step.eval_loss, step.divergence) for step in read_steps(folder / "loss.csv")
    ]
    assert {(r["eval_loss"], r["divergence"]) for r in rows if r["run"] != "finetune_lora"} == {
        ("", "")
    }


@pytest.mark.usefixtures("forked_processes")
@pytest.mark.usefixtures("forked_processes")
@pytest.mark.slow
async def test_an_exported_picture_has_the_evaluations_and_the_small_plots_too(root: Path) -> None:
    write_measured(root)
    async with open_curves(root) as (_, screen):
        loss, divergence, norm = screen.panels()
        marks = {
            curve["label"].partition(",")[0]: len(curve["held_out"]["x"])
            for curve in loss["curves"]
        }
        assert marks == {"finetune_full": 0, "finetune_freeze": 0, "finetune_lora": 10}
        assert (divergence["title"], norm["title"]) == (
            "Divergence from the base, nats/token",
            "Gradient norm",
        )
        assert (await export.render_chart(picture(screen))).count(b"<use") > 10


@pytest.mark.usefixtures("forked_processes")
@pytest.mark.parametrize(
    ("kind", "start"), [("svg", b"<?xml"), ("png", b"\x89PNG")], ids=["svg", "png"]
)
@pytest.mark.slow
async def test_pictures_are_written(root: Path, kind: str, start: bytes) -> None:
    async with open_curves(root) as (pilot, _):
        await save_as(pilot, f"out.{kind}")
        await until(pilot, lambda: (root / f"out.{kind}").exists(), 60)
    assert (root / f"out.{kind}").read_bytes().startswith(start)


async def test_the_picture_is_what_is_on_the_screen(root: Path) -> None:
    async with open_curves(root) as (pilot, screen):
        screen.set_focus(screen.chart)
        await pilot.press("up", "v")
        await until(pilot, lambda: screen.window.y is not None)
        loss, norm = screen.panels()
        view = screen.chart.plot
        assert picture(screen)["x"] == view.x
        assert loss["y"] == pytest.approx([10**end for end in view.y])
        assert (loss["log"], norm["log"], norm["title"]) == (True, False, "Gradient norm")
        assert sorted(curve["sign"] for curve in loss["curves"]) == sorted(["●", "▲", "■"])
        assert all("flat from epoch" in curve["label"] for curve in loss["curves"])


@pytest.mark.usefixtures("forked_processes")
@pytest.mark.slow
async def test_a_free_name_is_proposed_and_what_exists_is_replaced_after_a_question(
    root: Path,
) -> None:
    (root / "curves.svg").write_text("before", encoding="utf-8")
    async with open_curves(root) as (pilot, _):
        await pilot.press("x")
        await until(pilot, lambda: isinstance(pilot.app.screen, PathScreen))
        assert pilot.app.screen.query_one(Input).value == "curves-2.svg"
        await pilot.press("escape")
        await save_as(pilot, "curves.svg")
        await until(pilot, lambda: isinstance(pilot.app.screen, Ask))
        await pilot.press("escape")
        assert (root / "curves.svg").read_text(encoding="utf-8") == "before"
        await save_as(pilot, "curves.svg")
        await until(pilot, lambda: isinstance(pilot.app.screen, Ask))
        await pilot.press("y")
        await until(pilot, lambda: (root / "curves.svg").read_bytes().startswith(b"<?xml"))


@pytest.mark.parametrize(
    ("path", "message"),
    [("loss.txt", "must end in .svg or .png"), ("no/where.csv", "is not a folder")],
    ids=["suffix", "folder"],
)
async def test_a_path_that_cannot_be_is_one_message(root: Path, path: str, message: str) -> None:
    async with open_curves(root) as (pilot, screen):
        await save_as(pilot, path)
        await until(pilot, lambda: screen.workbench.message_history)
        assert message in screen.workbench.message_history[-1].text


async def test_nothing_to_export_is_a_warning(empty: Path) -> None:
    async with open_curves(empty) as (pilot, screen):
        await pilot.press("x")
        assert "nothing to export" in screen.workbench.message_history[-1].text


async def test_a_full_disk_is_one_message_and_no_half_file(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    before = sorted(path.name for path in root.iterdir())
    async with open_curves(root) as (pilot, screen):
        await save_as(pilot, "all.csv")
        await until(pilot, lambda: screen.workbench.message_history)
        (message,) = screen.workbench.message_history
        assert message.severity == "error" and "No space left" in message.text
    assert sorted(path.name for path in root.iterdir()) == before


async def test_a_picture_that_cannot_be_drawn_is_one_message(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tui.screens.curves.export.sys.executable", "/bin/false")
    async with open_curves(root) as (pilot, screen):
        await save_as(pilot, "out.svg")
        await until(pilot, lambda: screen.workbench.message_history)
        assert "could not be drawn" in screen.workbench.message_history[-1].text
    assert not (root / "out.svg").exists()
