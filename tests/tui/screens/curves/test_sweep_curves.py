"""A sweep on the curves screen: one line with a curve per adapter; live, opened, pointed to,
exported.
"""

import csv
from math import nan
from pathlib import Path
from typing import Any

import pytest

from pipeline.project.logs.run_log import final_loss, read_steps
from tests.helpers.curves import (
    answers_text,
    chart_text,
    details_text,
    list_lines,
    list_text,
    names_on,
    open_curves,
    point_to,
    ranges,
    save_as,
    wait_until_drawn,
)
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
    write_samples,
    write_sweep,
)
from tui.panes.plot.series import Line
from tui.screens.curves.screen import CurvesScreen

FOUR = {"rank-1": 6.0, "rank-2": 5.0, "rank-4": 3.0, "rank-8": 4.0}  # the third is the best
SIGN = "★"


def drawn(screen: CurvesScreen) -> dict[str, Line]:
    """Adapter or stage → what is drawn of it, in drawing order; a quiet line has no label."""
    names = [curve.name or curve.view.run.stage for curve in screen.plots.curves]
    lines = [line for line in screen.plots.chart.shown if isinstance(line, Line)]
    return dict(zip(names, lines, strict=True))


async def open_sweep(pilot: Any, screen: CurvesScreen) -> None:
    """List the sweep's adapters."""
    await point_to(pilot, screen, "sweep")
    await pilot.press("enter")
    await until(pilot, lambda: f"{SIGN} ▾ sweep" in list_text(screen))


async def test_a_sweep_is_one_line_and_its_details_name_the_best(empty: Path) -> None:
    folder = write_sweep(empty, FOUR)
    async with open_curves(empty) as (_, screen):
        loss = final_loss(read_steps(folder / "rank-4/loss.csv"))
        assert list_lines(screen) == [f"{SIGN} ▸ sweep 4 adapters {loss:.3g}"]
        assert f"best rank-4: loss {loss:.4g}" in details_text(screen)
        assert "diverged" not in details_text(screen) and "stopped" not in details_text(screen)


async def test_its_best_curve_is_on_top_and_the_others_are_quiet(empty: Path) -> None:
    write_methods(empty)
    write_sweep(empty, FOUR)
    async with open_curves(empty) as (pilot, screen):
        await point_to(pilot, screen, "sweep")
        result = drawn(screen)
        assert (
            set(list(result)[:3]) == {"rank-1", "rank-2", "rank-8"} and list(result)[-1] == "rank-4"
        )
        assert [name for name, line in result.items() if not line.label] == [
            "rank-1",
            "rank-2",
            "rank-8",
        ]
        assert f"{SIGN} sweep rank-4" in chart_text(screen) and "rank-1" not in chart_text(screen)


async def test_it_is_switched_as_one_also_from_the_line_of_an_adapter(empty: Path) -> None:
    write_methods(empty)
    write_sweep(empty, FOUR)
    async with open_curves(empty) as (pilot, screen):
        await open_sweep(pilot, screen)
        await pilot.press("space")
        await until(pilot, lambda: not any("sweep" in name for name in names_on(screen)))
        assert not any("rank" in name for name in drawn(screen))
        await pilot.press("down", "space")
        await until(pilot, lambda: len(drawn(screen)) == 7)


async def test_enter_lists_its_adapters_with_their_loss_and_enter_closes_the_list(
    empty: Path,
) -> None:
    folder = write_sweep(
        empty, FOUR, {"rank-1": ("diverged", 20), "rank-8": ("stopped early", 200)}
    )
    async with open_curves(empty) as (pilot, screen):
        await open_sweep(pilot, screen)
        for name, sign, end in (
            *(("rank-1", "", " diverged"), ("rank-2", "", "")),
            *(("rank-4", f"{SIGN} ", ""), ("rank-8", "", " stopped")),
        ):
            loss = final_loss(read_steps(folder / name / "loss.csv"))
            assert f"{sign}{name} {loss:.3g}{end}" in list_lines(screen)
        await pilot.press("down", "down", "enter")
        await until(pilot, lambda: "▸ sweep" in list_text(screen))
        assert screen.table.cursor == 0


async def test_opening_a_sweep_that_is_off_switches_it_on(empty: Path) -> None:
    write_sweep(empty, FOUR)
    async with open_curves(empty) as (pilot, screen):
        await pilot.press("space")
        await until(pilot, lambda: not names_on(screen))
        await pilot.press("enter")
        await until(pilot, lambda: bool(names_on(screen)) and "rank-8 0" in list_text(screen))


async def test_the_adapter_under_the_cursor_is_on_top(empty: Path) -> None:
    write_sweep(empty, FOUR)
    async with open_curves(empty) as (pilot, screen):
        await open_sweep(pilot, screen)
        await point_to(pilot, screen, "rank-2")
        await until(pilot, lambda: list(drawn(screen))[-1] == "rank-2")
        line = drawn(screen)["rank-2"]
        assert line.bold and line.label
        assert "sweep rank-2" in chart_text(screen) and "sweep rank-4" in chart_text(screen)
        assert "rank-2" in details_text(screen).splitlines()[0]
        await point_to(pilot, screen, "sweep")
        await until(pilot, lambda: not drawn(screen)["rank-2"].label)


@pytest.mark.slow
async def test_the_filter_finds_adapters(empty: Path) -> None:
    write_methods(empty)
    write_sweep(empty, FOUR)
    async with open_curves(empty) as (pilot, screen):
        await pilot.press("slash", *"rank-8")
        await until(pilot, lambda: len(list_lines(screen)) == 2)
        assert "rank-8" in list_lines(screen)[1]


async def test_another_screen_can_ask_for_an_adapter(empty: Path) -> None:
    write_sweep(empty, FOUR)
    async with open_curves(empty) as (pilot, screen):
        screen.workbench.go("curves", run="finetune_sweep/rank-8")
        await until(pilot, lambda: "rank-8" in details_text(screen).splitlines()[0])


async def test_a_diverged_adapter_is_named_and_does_not_affect_the_axis(empty: Path) -> None:
    outcomes = {"rank-1": ("diverged", 30), "rank-2": ("stopped early", 100)}
    write_sweep(empty, {**FOUR, "rank-1": 1e6}, outcomes)
    async with open_curves(empty) as (pilot, screen):
        assert "1 diverged: rank-1" in details_text(
            screen
        ) and "1 stopped early: rank-2" in details_text(screen)
        result = drawn(screen)
        ends = [result[name].points[-1][0] for name in outcomes]
        assert [end <= last for end, (_, last) in zip(ends, outcomes.values(), strict=True)] == [
            True,
            True,
        ]
        assert ranges(screen)[1][1] < 1, "an exponent of ten"
        await pilot.press("l")
        assert ranges(screen)[1][1] < 10


async def test_where_all_diverged_the_last_to_do_so_is_still_drawn(empty: Path) -> None:
    write_sweep(empty, FOUR, dict.fromkeys(FOUR, ("diverged", 9)), "failed")
    async with open_curves(empty) as (_, screen):
        assert "4 diverged: rank-1, rank-2, rank-4, rank-8" in details_text(screen)
        assert "best" not in details_text(screen)
        assert ranges(screen)[1][1] > 1


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
        "\n".join([*lines_before[:300], ",".join([*cells[:6], "0.0123", cells[7]])]) + "\n",
        encoding="utf-8",
    )
    async with open_curves(empty) as (_, screen):
        assert "best rank-1: held out 0.0123" in details_text(screen)


async def test_its_curves_move_while_it_runs_and_one_that_diverges_is_reported_immediately(
    empty: Path,
) -> None:
    folder = write_sweep(empty, FOUR, state="running", steps=20)
    with hold(folder):
        async with open_curves(empty) as (pilot, screen):
            assert ranges(screen)[0] == (1, 20)
            assert "running · 20 of 300 steps" in details_text(screen)
            assert "4 × 32 tokens/s" in details_text(screen) and "2 min 20 s left" in details_text(
                screen
            )
            for name in ("rank-2", "rank-4", "rank-8"):
                with (folder / name / "loss.csv").open("a", encoding="utf-8") as file:
                    file.write(lines(FOUR[name], 21, 40))
            write_ends(folder, {"rank-1": ("diverged", 20)})
            await until(pilot, lambda: ranges(screen)[0] == (1, 40))
            await until(pilot, lambda: "1 diverged: rank-1" in details_text(screen))
            assert "40 of 300" in details_text(screen)
            await until(pilot, lambda: "3 × 32 tokens/s" in details_text(screen))
            assert drawn(screen)["rank-1"].points[-1][0] == 20


async def test_an_adapter_whose_log_begins_later_joins_the_others(empty: Path) -> None:
    folder = write_sweep(empty, {"rank-1": 6.0}, state="running", steps=20)
    async with open_curves(empty) as (pilot, screen):
        assert "sweep 1 adapter " in list_text(screen)
        write_sweep(empty, {"rank-1": 6.0, "rank-2": 5.0}, state="running", steps=20)
        await until(pilot, lambda: "2 adapters" in list_text(screen))
        await wait_until_drawn(pilot, screen)
        assert set(drawn(screen)) == {"rank-1", "rank-2"}
        journal(folder, "stopped", 20, message="finetune_sweep: stopped after step 20 of 300")
        await until(pilot, lambda: "stopped after step 20" in details_text(screen))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"rank-1": 3}', '{"rank-1": {}}'],
    ids=["empty", "half", "list", "number", "object"],
)
async def test_a_broken_outcomes_file_is_ignored(empty: Path, text: str) -> None:
    (write_sweep(empty, FOUR) / "sweep.json").write_text(text, encoding="utf-8")
    async with open_curves(empty) as (_, screen):
        assert "best rank-4" in details_text(screen) and "diverged" not in details_text(screen)


async def test_the_best_stays_the_best_when_other_runs_appear(empty: Path) -> None:
    """The folders are searched again, and nothing of the sweep has changed."""
    write_sweep(empty, FOUR)
    async with open_curves(empty) as (pilot, screen):
        write_methods(empty)
        await until(pilot, lambda: len(screen.runs.views) > 1)
        await wait_until_drawn(pilot, screen)
        assert "best rank-4" in details_text(screen)


async def test_a_loss_that_is_not_finite_is_never_the_best(empty: Path) -> None:
    folder = write_sweep(empty, FOUR)
    (folder / "rank-1/loss.csv").write_text(HEADER + f"1,1,{nan},0.001,1,16\n", encoding="utf-8")
    async with open_curves(empty) as (_, screen):
        assert "best rank-4" in details_text(screen)


async def test_an_adapter_that_diverged_is_never_the_best(empty: Path) -> None:
    write_sweep(empty, FOUR, {"rank-4": ("diverged", 299)})
    async with open_curves(empty) as (_, screen):
        assert "best rank-8" in details_text(screen)


@pytest.mark.parametrize("size", [(80, 24), (120, 40), (40, 10)], ids=["80x24", "120x40", "40x10"])
async def test_thirty_two_adapters_with_long_names_scroll(
    empty: Path, size: tuple[int, int]
) -> None:
    names = {
        f"rank-{rank}_targets-q_proj+v_proj+fc1+fc2_lr-0.000{seed}_seed-0": 4.0 + rank + seed / 9
        for rank in (1, 2, 4, 8)
        for seed in range(8)
    }
    write_sweep(empty, names, {next(iter(names)): ("diverged", 7)}, steps=60)
    async with open_curves(empty, size) as (pilot, screen):
        await open_sweep(pilot, screen)
        runs = screen.table
        assert len(runs.texts()) == 33
        await pilot.press("end")
        await until(pilot, lambda: runs.cursor == 32 and runs.scroll_offset.y > 0)
        assert list(drawn(screen))[-1] == list(names)[-1]
        assert runs.region.bottom <= size[1] and screen.plots.chart.size.height > 0
        await pilot.press("home")
        await until(pilot, lambda: runs.cursor == 0)


async def test_answers_are_those_of_its_best_and_of_the_one_under_the_cursor(empty: Path) -> None:
    folder = write_sweep(empty, {"rank-1": 5.0, "rank-2": 3.0})
    for name in ("rank-1", "rank-2"):
        write_samples(folder / name, {300: f"of {name}"})
    async with open_curves(empty) as (pilot, screen):
        assert "of rank-2" in answers_text(screen) and "of rank-1" not in answers_text(screen)
        await pilot.press("enter", "down")
        await until(pilot, lambda: "of rank-1" in answers_text(screen))


async def test_csv_has_the_rows_of_every_adapter_and_a_picture_names_the_best(empty: Path) -> None:
    folder = write_sweep(empty, FOUR, {"rank-2": ("diverged", 50)})
    write_run(empty, "finetune_lora")
    async with open_curves(empty) as (pilot, screen):
        await point_to(pilot, screen, "sweep")
        curves = screen.plots.panels()[0]["curves"]
        assert [curve["label"] for curve in curves[:3]] == ["", "", ""]
        assert curves[-1]["label"] == "sweep rank-4"
        await save_as(pilot, "all.csv")
        await until(pilot, lambda: (empty / "all.csv").exists())
    with (empty / "all.csv").open(encoding="utf-8") as file:
        result = list(csv.DictReader(file))
    for name in FOUR:
        steps = read_steps(folder / name / "loss.csv")
        ours = [
            float(row["loss"])
            for row in result
            if row["run"] == f"finetune_sweep  4 adapters, {name}"
        ]
        assert ours == [step.loss for step in steps]
