"""What is exported: pictures of what is on the screen, numbers of the runs that are on."""

import csv
import errno
from pathlib import Path
from typing import Any

import pytest

from pipeline.project.logs.run_log import read_steps
from tests.helpers.curves import open_curves, ranges, save_as, window
from tests.helpers.pilot import screen_opens, until
from tests.helpers.run_folders import write_measured
from tui.dialogs import Ask, AskText
from tui.screens.curves import export
from tui.screens.curves.screen import CurvesScreen


def picture(screen: CurvesScreen) -> dict[str, Any]:
    return {"format": "svg", "title": "", "panels": screen.plots.panels()}


async def test_csv_has_every_row_of_the_visible_runs(three_runs: Path) -> None:
    async with open_curves(three_runs) as (pilot, screen):
        await save_as(pilot, "all.csv")
        await until(pilot, lambda: (three_runs / "all.csv").exists())
        assert isinstance(pilot.app.screen, CurvesScreen), screen
    with (three_runs / "all.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    steps = read_steps(three_runs / "runs/finetune_lora/loss.csv")
    ours = [row for row in rows if row["run"] == "finetune_lora"]
    assert [
        (int(r["step"]), int(r["epoch"]), float(r["loss"]), int(r["tokens"])) for r in ours
    ] == [(step.step, step.epoch, step.loss, step.tokens) for step in steps]
    assert len(rows) == 3 * len(steps)


async def test_csv_has_the_optional_columns_of_the_runs_that_have_them(three_runs: Path) -> None:
    folder = write_measured(three_runs)
    async with open_curves(three_runs) as (pilot, _):
        await save_as(pilot, "all.csv")
        await until(pilot, lambda: (three_runs / "all.csv").exists())
    with (three_runs / "all.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    ours = [(r["eval_loss"], r["divergence"]) for r in rows if r["run"] == "finetune_lora"]
    assert [tuple(float(cell) if cell else None for cell in row) for row in ours] == [
        (step.eval_loss, step.divergence) for step in read_steps(folder / "loss.csv")
    ]
    assert {(r["eval_loss"], r["divergence"]) for r in rows if r["run"] != "finetune_lora"} == {
        ("", "")
    }


@pytest.mark.slow
async def test_an_exported_picture_has_the_evaluations_and_the_small_plots_too(
    three_runs: Path,
) -> None:
    write_measured(three_runs)
    async with open_curves(three_runs) as (_, screen):
        loss, divergence, norm = screen.plots.panels()
        marks = {curve["label"]: len(curve["marks"]) for curve in loss["curves"]}
        assert marks == {"full": 0, "freeze": 0, "lora": 10}
        assert (divergence["title"], norm["title"]) == (
            "Divergence from the base, nats/token",
            "Gradient norm",
        )
        assert export.render_chart(picture(screen)).count(b"<use") > 10


@pytest.mark.parametrize(
    ("kind", "start"), [("svg", b"<?xml"), ("png", b"\x89PNG")], ids=["svg", "png"]
)
@pytest.mark.slow
async def test_pictures_are_written(three_runs: Path, kind: str, start: bytes) -> None:
    async with open_curves(three_runs) as (pilot, _):
        await save_as(pilot, f"out.{kind}")
        await until(pilot, lambda: (three_runs / f"out.{kind}").exists(), 60)
    assert (three_runs / f"out.{kind}").read_bytes().startswith(start)


async def test_the_picture_is_what_is_on_the_screen(three_runs: Path) -> None:
    async with open_curves(three_runs) as (pilot, screen):
        screen.set_focus(screen.plots.chart)
        await pilot.press("up", "v")
        await until(pilot, lambda: window(screen).y is not None)
        loss, norm = screen.plots.panels()
        x, y = ranges(screen)
        assert loss["x"] == norm["x"] == x
        assert loss["y"] == pytest.approx([10**end for end in y])
        assert (loss["log"], norm["log"], norm["title"]) == (True, False, "Gradient norm")
        assert sorted(curve["sign"] for curve in loss["curves"]) == sorted(["●", "▲", "■"])
        assert all(curve["flat"] for curve in loss["curves"])


@pytest.mark.slow
async def test_what_exists_is_replaced_after_a_question(
    three_runs: Path,
) -> None:
    (three_runs / "curves.svg").write_text("before", encoding="utf-8")
    async with open_curves(three_runs) as (pilot, _):
        await pilot.press("x")
        await screen_opens(pilot, AskText)
        await pilot.press("enter")
        await screen_opens(pilot, Ask)
        await pilot.press("escape")
        assert (three_runs / "curves.svg").read_text(encoding="utf-8") == "before"
        await save_as(pilot, "curves.svg")
        await screen_opens(pilot, Ask)
        await pilot.press("y")
        await until(pilot, lambda: (three_runs / "curves.svg").read_bytes().startswith(b"<?xml"))


@pytest.mark.parametrize(
    ("path", "message"),
    [("loss.txt", "must end in .svg or .png"), ("no/where.csv", "No such file or directory")],
    ids=["suffix", "folder"],
)
async def test_a_path_that_cannot_be_is_one_message(
    three_runs: Path, path: str, message: str
) -> None:
    (three_runs / "loss.txt").write_text("kept")  # no question whether to replace it
    async with open_curves(three_runs) as (pilot, screen):
        await save_as(pilot, path)
        await until(pilot, lambda: screen.workbench.message_history)
        assert (three_runs / "loss.txt").read_text() == "kept"
        assert message in screen.workbench.message_history[-1].text


async def test_nothing_to_export_is_a_warning(empty: Path) -> None:
    async with open_curves(empty) as (pilot, screen):
        await pilot.press("x")
        assert "nothing to export" in screen.workbench.message_history[-1].text


async def test_a_full_disk_is_one_message_and_no_half_file(
    three_runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    before = sorted(path.name for path in three_runs.iterdir())
    async with open_curves(three_runs) as (pilot, screen):
        await save_as(pilot, "all.csv")
        await until(pilot, lambda: screen.workbench.message_history)
        (message,) = screen.workbench.message_history
        assert message.severity == "error" and "No space left" in message.text
    assert sorted(path.name for path in three_runs.iterdir()) == before


async def test_a_picture_that_cannot_be_drawn_is_one_message(
    three_runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    async with open_curves(three_runs) as (pilot, screen):
        await save_as(pilot, "out.svg")
        await until(pilot, lambda: screen.workbench.message_history)
        assert "could not be drawn" in screen.workbench.message_history[-1].text
    assert not (three_runs / "out.svg").exists()
