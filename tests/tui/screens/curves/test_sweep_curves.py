"""A sweep on the curves screen: one row with a curve per adapter; live, expanded, highlighted, exported."""

import csv
from math import nan
from pathlib import Path
from typing import Any

import pytest

from pipeline.project.logs.run_log import final_loss, read_steps
from tests.helpers.pilot import until
from tests.helpers.run_folders import (
    HEADER,
    hold,
    journal,
    lines,
    measured,
    write_ends,
    write_methods,
    write_run,
    write_sweep,
)
from tests.tui.screens.curves.test_curves import (
    ask_for,
    chart,
    list_text,
    open_curves,
    shown_labels,
    status_line,
    wait_until_drawn,
)
from tui.screens.curves import export
from tui.screens.curves.runs import POINTED
from tui.screens.curves.screen import CurvesScreen, RunList
from tui.widgets.line_chart import Curve, range_of

FOUR = {"rank-1": 6.0, "rank-2": 5.0, "rank-4": 3.0, "rank-8": 4.0}  # the third is the best
SIGN = "★"


def drawn(screen: CurvesScreen) -> dict[str, Curve]:
    """Adapter or stage → its curve, in drawing order."""
    x = screen._step_range()
    return {
        line.curve_log.name or line.view.run.stage: line.curve("loss", x, 152)
        for line in screen.runs.lines(screen._pointed)
    }


def rows(screen: CurvesScreen) -> list[str]:
    return [row.strip() for row in list_text(screen).splitlines()]


async def expand_sweep(pilot: Any, screen: CurvesScreen) -> None:
    """Expand the sweep in the list."""
    screen.set_focus(screen.query_one(RunList))
    index = next(n for n, view in enumerate(screen.runs.views.values()) if view.run.sweeps)
    screen.query_one(RunList).highlighted = index
    await pilot.press("enter")
    await until(pilot, lambda: "▾ finetune_sweep" in list_text(screen))


async def test_a_sweep_is_one_entry_that_names_its_best_adapter(empty: Path) -> None:
    folder = write_sweep(empty, FOUR)
    async with open_curves(empty) as (_, screen):
        assert len(screen.query_one(RunList).options) == 1
        loss = final_loss(read_steps(folder / "rank-4/loss.csv"))
        assert f"{SIGN} ▸ finetune_sweep  4 adapters  finished  300/300" in list_text(screen)
        assert f"best rank-4: loss {loss:.4g}" in list_text(screen)
        assert "diverged" not in list_text(screen) and "stopped" not in list_text(screen)


async def test_its_best_curve_is_on_top_and_the_others_are_dim_lines(empty: Path) -> None:
    write_methods(empty)
    write_sweep(empty, FOUR)
    async with open_curves(empty) as (_, screen):
        result = drawn(screen)
        assert list(result) == [
            *("rank-1", "rank-2", "rank-8"),
            *("finetune_full", "finetune_freeze", "finetune_lora", "rank-4"),
        ]
        assert [name for name, curve in result.items() if curve.dim] == ["rank-1", "rank-2", "rank-8"]
        assert len({curve.color for name, curve in result.items() if "rank" in name}) == 1


async def test_it_is_switched_as_one_also_from_the_line_of_an_adapter(empty: Path) -> None:
    write_methods(empty)
    write_sweep(empty, FOUR)
    async with open_curves(empty) as (pilot, screen):
        await expand_sweep(pilot, screen)
        await pilot.press("space")
        await until(pilot, lambda: not any("sweep" in label for label in shown_labels(screen)))
        assert not any("rank" in name for name in drawn(screen))
        await pilot.press("down", "space")
        await until(pilot, lambda: any("sweep" in label for label in shown_labels(screen)))
        assert len(drawn(screen)) == 7


async def test_enter_lists_its_adapters_with_their_loss_and_enter_closes_the_list(empty: Path) -> None:
    folder = write_sweep(empty, FOUR, {"rank-1": ("diverged", 20), "rank-8": ("stopped early", 200)})
    async with open_curves(empty) as (pilot, screen):
        await expand_sweep(pilot, screen)
        for name, sign, end in (
            *(("rank-1", "", "  diverged after 20"), ("rank-2", "", "")),
            *(("rank-4", f"{SIGN} ", ""), ("rank-8", "", "  stopped after 200")),
        ):
            loss = final_loss(read_steps(folder / name / "loss.csv"))
            assert f"{sign}{name}  loss {loss:.4g}{end}" in rows(screen)
        await pilot.press("down", "down", "enter")
        await until(pilot, lambda: "▸ finetune_sweep" in list_text(screen))
        assert screen.query_one(RunList).highlighted == 0


async def test_opening_a_sweep_that_is_hidden_shows_it(empty: Path) -> None:
    write_sweep(empty, FOUR)
    async with open_curves(empty) as (pilot, screen):
        screen.set_focus(screen.query_one(RunList))
        await pilot.press("space")
        await until(pilot, lambda: not shown_labels(screen))
        await pilot.press("enter")
        await until(pilot, lambda: bool(shown_labels(screen)) and "rank-8  loss" in list_text(screen))


async def test_the_highlighted_adapter_is_drawn_on_top(empty: Path) -> None:
    write_sweep(empty, FOUR)
    async with open_curves(empty) as (pilot, screen):
        await expand_sweep(pilot, screen)
        await pilot.press("down", "down")
        await until(pilot, lambda: list(drawn(screen))[-1] == "rank-2")
        curve = drawn(screen)["rank-2"]
        assert (curve.sign, curve.color, curve.dim) == (POINTED.sign, POINTED.color, False)
        screen.action_cursor()
        assert (
            "☆ rank-2 " in status_line(screen)
            and f"{SIGN} rank-4 " in status_line(screen)
            and "rank-1" not in status_line(screen)
        )
        await pilot.press("up", "up")
        await until(pilot, lambda: drawn(screen)["rank-2"].dim)


async def test_a_diverged_adapter_is_named_and_does_not_affect_the_axis(empty: Path) -> None:
    outcomes = {"rank-1": ("diverged", 30), "rank-2": ("stopped early", 100)}
    write_sweep(empty, {**FOUR, "rank-1": 1e6}, outcomes)
    async with open_curves(empty) as (_, screen):
        assert "1 diverged: rank-1" in list_text(screen) and "1 stopped early: rank-2" in list_text(screen)
        result = drawn(screen)
        assert [result[name].columns[-1].x <= last for name, (_, last) in outcomes.items()] == [True, True]
        assert screen._chart._y == range_of(curve for name, curve in result.items() if name != "rank-1")
        assert screen._chart._y[1] < 10


async def test_where_all_diverged_the_last_to_do_so_is_still_drawn(empty: Path) -> None:
    write_sweep(empty, FOUR, dict.fromkeys(FOUR, ("diverged", 9)), "failed")
    async with open_curves(empty) as (_, screen):
        assert "4 diverged: rank-1, rank-2 and 2 more" in list_text(screen)
        assert "best" not in list_text(screen)
        assert screen._chart._y[1] > 1


async def test_the_best_is_that_on_held_out_examples_where_they_were_measured(empty: Path) -> None:
    folder = write_sweep(empty, FOUR)
    for name in FOUR:
        log = folder / name / "loss.csv"
        text = measured(log.read_text(encoding="utf-8"))
        log.write_text(text.replace(",,", ",0.01,") if name == "rank-1" else text, encoding="utf-8")
    log = folder / "rank-1/loss.csv"
    lines_before = log.read_text(encoding="utf-8").splitlines()
    cells = lines_before[300].split(",")
    log.write_text(
        "\n".join([*lines_before[:300], ",".join([*cells[:6], "0.0123", cells[7]])]) + "\n", encoding="utf-8"
    )
    async with open_curves(empty) as (_, screen):
        assert "best rank-1: held out 0.0123" in list_text(screen)


async def test_its_curves_move_while_it_runs_and_one_that_diverges_is_reported_immediately(empty: Path) -> None:
    folder = write_sweep(empty, FOUR, state="running", steps=20)
    with hold(folder):
        async with open_curves(empty, (160, 40)) as (pilot, screen):
            assert chart(screen).shown.x == (1, 20)
            assert "live  20/300" in list_text(screen)
            assert "4 × 32 tok/s" in list_text(screen) and "2 min 20 s left" in list_text(screen)
            for name in ("rank-2", "rank-4", "rank-8"):
                with (folder / name / "loss.csv").open("a", encoding="utf-8") as file:
                    file.write(lines(FOUR[name], 21, 40))
            write_ends(folder, {"rank-1": ("diverged", 20)})
            await until(pilot, lambda: chart(screen).shown.x == (1, 40))
            await until(pilot, lambda: "1 diverged: rank-1" in list_text(screen))
            assert "40/300" in list_text(screen) and "3 × 32 tok/s" in list_text(screen)
            assert drawn(screen)["rank-1"].columns[-1].x == 20


async def test_an_adapter_whose_log_begins_later_joins_the_others(empty: Path) -> None:
    folder = write_sweep(empty, {"rank-1": 6.0}, state="running", steps=20)
    async with open_curves(empty) as (pilot, screen):
        assert "1 adapter " in list_text(screen)
        write_sweep(empty, {"rank-1": 6.0, "rank-2": 5.0}, state="running", steps=20)
        await until(pilot, lambda: "2 adapters" in list_text(screen))
        await wait_until_drawn(pilot, screen)
        assert set(drawn(screen)) == {"rank-1", "rank-2"}
        journal(folder, "stopped", 20, message="finetune_sweep: stopped after step 20 of 300")
        await until(pilot, lambda: "stopped after step 20" in list_text(screen))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"rank-1": 3}', '{"rank-1": {}}'])
async def test_a_broken_outcomes_file_is_ignored(empty: Path, text: str) -> None:
    (write_sweep(empty, FOUR) / "sweep.json").write_text(text, encoding="utf-8")
    async with open_curves(empty) as (_, screen):
        assert "best rank-4" in list_text(screen) and "diverged" not in list_text(screen)


async def test_the_best_stays_the_best_when_other_runs_appear(empty: Path) -> None:
    """The folders are searched again, and nothing of the sweep has changed."""
    write_sweep(empty, FOUR)
    async with open_curves(empty) as (pilot, screen):
        write_methods(empty)
        await until(pilot, lambda: len(screen.runs.views) > 1)
        await wait_until_drawn(pilot, screen)
        assert "best rank-4" in list_text(screen)


async def test_a_loss_that_is_not_finite_is_never_the_best(empty: Path) -> None:
    folder = write_sweep(empty, FOUR)
    (folder / "rank-1/loss.csv").write_text(HEADER + f"1,1,{nan},0.001,1,16\n", encoding="utf-8")
    async with open_curves(empty) as (_, screen):
        assert "best rank-4" in list_text(screen)


async def test_an_adapter_that_diverged_is_never_the_best(empty: Path) -> None:
    write_sweep(empty, FOUR, {"rank-4": ("diverged", 299)})
    async with open_curves(empty) as (_, screen):
        assert "best rank-8" in list_text(screen)


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (40, 10)])
async def test_thirty_two_adapters_with_long_names_scroll(empty: Path, size: tuple[int, int]) -> None:
    names = {
        f"rank-{rank}_targets-q_proj+v_proj+fc1+fc2_lr-0.000{seed}_seed-0": 4.0 + rank + seed / 9
        for rank in (1, 2, 4, 8)
        for seed in range(8)
    }
    write_sweep(empty, names, {next(iter(names)): ("diverged", 7)}, steps=60)
    async with open_curves(empty, size) as (pilot, screen):
        await expand_sweep(pilot, screen)
        runs = screen.query_one(RunList)
        assert len(runs.options) == 33
        await pilot.press("end")
        await until(pilot, lambda: runs.highlighted == 32 and runs.scroll_offset.y > 0)
        assert list(drawn(screen))[-1] == list(names)[-1]
        assert runs.region.bottom <= size[1] and chart(screen).size.height > 0
        await pilot.press("home")
        await until(pilot, lambda: runs.highlighted == 0)


async def test_csv_has_the_rows_of_every_adapter_and_a_picture_names_the_best(empty: Path) -> None:
    folder = write_sweep(empty, FOUR, {"rank-2": ("diverged", 50)})
    write_run(empty, "finetune_lora")
    async with open_curves(empty) as (pilot, screen):
        picture: Any = screen._chart_data("svg")
        labels = [curve["label"] for curve in picture["panels"][0]["curves"]]
        assert labels[:3] == ["", "", ""] and labels[4].startswith("finetune_sweep  4 adapters, rank-4")
        assert picture["panels"][0]["y"] is not None  # otherwise the diverged curve would set the range
        assert (await export.render_chart(picture)).count(b"<use") > 5
        await ask_for(pilot, "all.csv", "csv")
        await until(pilot, lambda: (empty / "all.csv").exists())
    with (empty / "all.csv").open(encoding="utf-8") as file:
        result = list(csv.DictReader(file))
    for name in FOUR:
        steps = read_steps(folder / name / "loss.csv")
        ours = [float(row["loss"]) for row in result if row["run"] == f"finetune_sweep  4 adapters, {name}"]
        assert ours == [step.loss for step in steps]
