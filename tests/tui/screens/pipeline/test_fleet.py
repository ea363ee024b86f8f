"""A fleet's run on the screens: its row and its units in Pipeline, its curves in Curves."""

import shutil
from pathlib import Path

import pytest

from pipeline.files.text import OBEYED
from pipeline.fleet.unit import end_unit
from tests.helpers.curves import details_text, list_lines, list_text, open_curves, point_to
from tests.helpers.fleets import SWEEP, attempt, new_fleet, train
from tests.helpers.pilot import screen_text, until
from tests.helpers.pipeline_screen import facts, messages, open_screen, row, rows, said, title
from tests.helpers.run_folders import HEADER, hold, journal, lines

EVIL = "no \x1b]8;;https://example.org\x07[red]file[/red]\x9b31m"


@pytest.mark.parametrize("size", [(80, 24), (120, 40)])
async def test_a_run_has_a_row_below_its_stage_and_a_table_of_units(
    empty: Path, size: tuple[int, int]
) -> None:
    run = new_fleet(empty, ["rank-1 rank-2", "rank-4", "rank-8"])
    attempt(run, 2, node="no\x1b[31mde")
    end_unit(run.unit_folder(2), 1, EVIL)
    with hold(train(run, 1, {"rank-1": 3.0, "rank-2": 4.0}, 150)) as lock:
        async with open_screen(empty, size) as (pilot, screen):
            await until(pilot, lambda: any("fleet" in line for line in rows(screen)))
            at = [line.split()[1] for line in rows(screen)]
            assert at.index("fleet") == at.index("sweep") + 1
            assert row(screen, "fleet").startswith("▶ fleet 0/3 17%")
            assert not screen.query_one("#units").display
            assert screen.rows.point("fleet 2d67857b")
            await until(pilot, lambda: title(screen, "facts").startswith("Fleet"))
            assert "▶ 17% 45 s left 150/900" in facts(screen)[0]
            assert "0 of 3 units, 1 running" in said(screen)
            units = [" ".join(text.split()) for text in screen.units.texts()]
            assert units[0].startswith("1 ▶ running node1") and "150/300" in units[0]
            assert "2 ✗ failed" in units[1] and "rank-4" in units[1]
            assert "[red]" in screen_text(pilot.app) and screen.query_one("#units").display
            assert not any(ord(sign) in OBEYED for sign in screen_text(pilot.app).replace("\n", ""))

            await pilot.press("S")
            assert "lora fleet collect 2d67857b" in messages(screen)
            await pilot.press("enter", "j")
            assert screen.units.has_focus and screen.units.pointed
            assert screen.units.pointed.label == "rank-4"

            journal(run.unit_folder(1) / "runs" / SWEEP, "running", 240, rate=10.0)
            await until(pilot, lambda: "240/300" in screen.units.texts()[0])
            lock.close()  # a process that is killed changes no file
            await until(pilot, lambda: row(screen, "fleet") == "✗ fleet 0/3 failed")
            await until(pilot, lambda: "lora fleet retry 2d67857b" in said(screen))
            for number in (1, 2, 3):
                end_unit(run.unit_folder(number), 0)
            await until(pilot, lambda: not any("fleet" in line for line in rows(screen)))


async def test_a_run_is_left_out_once_its_stage_has_run_since(empty: Path) -> None:
    run = new_fleet(empty, ["rank-1"])
    train(run, 1, {"rank-1": 3.0}, 20, "stopped")
    async with open_screen(empty) as (pilot, screen):
        await until(pilot, lambda: any("fleet 0/1 stopped" in line for line in rows(screen)))
        (empty / "runs" / SWEEP / "run.json").write_text(
            '{"state": "done", "pid": 1, "started": 1, "ended": 99999999999}'
        )
        await until(pilot, lambda: not any("fleet" in line for line in rows(screen)))


async def test_the_curves_of_all_units_grow_and_are_not_twice_once_collected(empty: Path) -> None:
    run = new_fleet(empty, ["rank-1 rank-2", "rank-4"])
    folder = empty / "runs" / SWEEP
    with (
        hold(train(run, 1, {"rank-1": 6.0, "rank-2": 5.0}, 20)) as first,
        hold(train(run, 2, {"rank-4": 3.0}, 10)) as second,
    ):
        async with open_curves(empty) as (pilot, screen):
            assert list_lines(screen)[0].startswith("★ ▸ sweep 3 adapters")
            assert list_lines(screen)[0].endswith("▶ 5%")
            await point_to(pilot, screen, "sweep")
            await pilot.press("enter")
            await until(pilot, lambda: "★ ▾ sweep" in list_text(screen))
            assert [line.split()[-2] for line in list_lines(screen)[1:3]] == ["rank-1", "rank-2"]
            assert "running · 30 of 600 steps" in details_text(screen)
            assert "29 s left" in details_text(screen)  # 290 steps at ten a second

            log = run.unit_folder(2) / "runs" / SWEEP / "rank-4/loss.csv"
            log.write_text(HEADER + lines(3.0, 1, 300), encoding="utf-8")
            await until(pilot, lambda: len(screen.runs.curves[2].log.steps) == 300)

            for number, lock, names in ((1, first, ["rank-1", "rank-2"]), (2, second, ["rank-4"])):
                made = train(run, number, dict.fromkeys(names, 3.0), 300, "done")
                lock.close()
                end_unit(run.unit_folder(number), 0)
                for name in names:
                    shutil.copytree(made / name, folder / name)
            journal(folder, "done", 300)
            await until(pilot, lambda: [v.run.log_folder for v in screen.runs.on] == [folder])
            assert len(screen.runs.views) == 1 and "▶" not in list_text(screen)


async def test_methods_and_seeds_have_a_curve_each(empty: Path) -> None:
    stages = ["finetune_lora", "finetune_lora", "finetune_full"]
    run = new_fleet(empty, [f"{stage},seed={n}" for n, stage in enumerate(stages)], stages)
    for number in (1, 2, 3):
        settings = train(run, number, {}, 20 * number, "stopped") / "settings.json"
        settings.write_text(f'{{"run": {{"key": "k", "params": {{"seed": {number - 1}}}}}}}')
    async with open_curves(empty) as (_, screen):
        names = sorted(view.name for view in screen.runs.views.values())
        assert names == ["full seed 2", "lora", "lora seed 1"]
