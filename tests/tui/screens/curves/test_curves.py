"""The curves screen: every key, the mouse, and runs that change while they are shown."""

import csv
import errno
import re
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import Input, RadioButton, Static
from textual.widgets._footer import FooterKey

from pipeline.project.logs.run_log import read_steps
from pipeline.project.logs.runs import discover_runs
from tests.helpers.pilot import until
from tests.helpers.run_folders import (
    HEADER,
    hold,
    journal,
    lines,
    measured,
    write_measured,
    write_methods,
    write_run,
    write_samples,
    write_sweep,
)
from tui.app import Workbench
from tui.screens.curves import export, runs
from tui.screens.curves.export import ExportScreen
from tui.screens.curves.screen import CurvesScreen, RunList
from tui.screens.curves.series import QUANTITIES
from tui.widgets.line_chart import LossChart, Range, is_drawable


@asynccontextmanager
async def open_curves(root: Path, size: tuple[int, int] = (80, 24)) -> AsyncIterator[tuple[Pilot[Any], CurvesScreen]]:
    """Open the screen and wait until it has read the files."""
    app = Workbench(root / "params.yaml")
    app.first_screen = "curves"
    async with app.run_test(size=size) as pilot:
        screen = app.screen
        assert isinstance(screen, CurvesScreen)
        await wait_until_drawn(pilot, screen)
        yield pilot, screen


async def wait_until_drawn(pilot: Pilot[Any], screen: CurvesScreen) -> None:
    """Wait until all files are read and drawn."""

    def done() -> bool:
        shown_labels = [screen.runs.views[key] for key in screen.runs.shown]
        return (
            screen.runs.stamp is not None and not screen._reading and not any(view.changed() for view in shown_labels)
        )

    await until(pilot, lambda: not screen._reading)  # a read that began earlier may miss what was written since
    screen._poll()
    await pilot.pause()
    await until(pilot, done)


async def to_the_list(pilot: Pilot[Any], screen: CurvesScreen) -> None:
    for _ in range(3):
        if not isinstance(screen.focused, RunList):
            await pilot.press("tab")
    assert isinstance(screen.focused, RunList)


def chart(screen: CurvesScreen, name: str = "loss") -> LossChart:
    return screen.query_one(f"#{name}", LossChart)


def status_line(screen: CurvesScreen) -> str:
    return str(screen.query_one("#mode", Static).render())


def title(screen: CurvesScreen) -> str:
    return str(chart(screen).query_one(Static).render())


def panels(screen: CurvesScreen) -> list[str]:
    return [name for name in QUANTITIES if chart(screen, name).display]


def options(screen: CurvesScreen) -> list[str]:
    return [str(option.prompt) for option in screen.query_one(RunList).options]


def list_text(screen: CurvesScreen) -> str:
    return "\n".join(options(screen))


def footer_keys(screen: CurvesScreen) -> list[str]:
    """The descriptions of the keys in the footer."""
    return [key.description for key in screen.query(FooterKey)]


def shown_labels(screen: CurvesScreen) -> set[str]:
    return {screen.runs.views[key].run.label for key in screen.runs.shown}


@pytest.fixture
def root(empty: Path) -> Path:
    write_methods(empty)
    return empty


async def test_without_runs_it_says_what_to_do(empty: Path) -> None:
    async with open_curves(empty) as (_, screen):
        assert screen.query_one("#nothing").display
        assert "make repro" in str(screen.query_one("#nothing", Static).render())
        assert not screen.query_one("#charts").display


async def test_a_first_run_takes_the_place_of_the_hint(empty: Path) -> None:
    async with open_curves(empty) as (pilot, screen):
        write_run(empty, "pretrain", 10)
        await wait_until_drawn(pilot, screen)
        assert screen.query_one("#charts").display
        assert screen.focused is chart(screen)
        assert shown_labels(screen) == {"pretrain"}


async def test_before_the_first_search_for_runs_there_is_no_hint_and_the_chart_keeps_the_focus(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a slow disk, the layout is drawn before the runs are found; this must not look like a project without runs."""
    discover, ready = discover_runs, threading.Event()
    monkeypatch.setattr(runs, "discover_runs", lambda *args: ready.wait(30) and discover(*args))
    app = Workbench(root / "params.yaml")
    async with app.run_test() as pilot:
        await pilot.press("2")
        await until(pilot, lambda: isinstance(app.screen, CurvesScreen))
        screen = app.screen
        assert isinstance(screen, CurvesScreen)
        screen.redraw()  # as when the terminal is resized
        await pilot.pause()
        assert screen.focused is chart(screen)
        assert not screen.query_one("#nothing").display
        ready.set()
        await wait_until_drawn(pilot, screen)
        assert screen.focused is chart(screen)
        assert shown_labels(screen)


async def test_the_three_methods_are_shown_first(root: Path) -> None:
    write_run(root, "pretrain")
    write_run(root, "train_from_scratch")
    async with open_curves(root) as (_, screen):
        assert shown_labels(screen) == {"finetune_full", "finetune_freeze", "finetune_lora"}


@pytest.mark.parametrize("stage", ["pretrain", "train_from_scratch"])
async def test_a_running_training_from_random_weights_is_shown_instead(root: Path, stage: str) -> None:
    with hold(write_run(root, stage, 20, "running")):
        async with open_curves(root) as (_, screen):
            assert shown_labels(screen) == {stage}


async def test_space_enter_and_a_click_switch_a_run(root: Path) -> None:
    async with open_curves(root) as (pilot, screen):
        await to_the_list(pilot, screen)
        await pilot.press("space")
        await until(pilot, lambda: shown_labels(screen) == {"finetune_freeze", "finetune_lora"})
        await pilot.press("enter")
        await until(pilot, lambda: len(shown_labels(screen)) == 3)
        await pilot.click(RunList, offset=(2, 0))
        await until(pilot, lambda: shown_labels(screen) == {"finetune_freeze", "finetune_lora"})
        assert "[ ] ● finetune_full" in list_text(screen)


async def test_log_turns_the_values_into_powers_of_ten_and_back(root: Path) -> None:
    async with open_curves(root) as (pilot, screen):
        linear = chart(screen).shown.y
        await pilot.press("l")
        assert chart(screen).shown.log
        assert chart(screen).shown.y != linear
        assert "log" in status_line(screen)
        await pilot.press("l")
        assert chart(screen).shown.y == linear


async def test_zoom_and_pan_freeze_and_f_follows_with_the_same_width(root: Path) -> None:
    async with open_curves(root) as (pilot, screen):
        assert chart(screen).shown.x == (1, 300)
        await pilot.press("plus")
        await until(pilot, lambda: not screen.window.following)
        low, high = chart(screen).shown.x
        assert high - low == pytest.approx(0.7 * 299)
        assert "frozen: f follows again" in status_line(screen)
        await pilot.press("left")
        await until(pilot, lambda: chart(screen).shown.x[0] < low)
        assert chart(screen).shown.x == pytest.approx((low - 0.07 * 299, high - 0.07 * 299))
        await pilot.press("f")
        assert chart(screen).shown.x == pytest.approx((300 - 0.7 * 299, 300))
        assert "following" in status_line(screen)


async def test_reset_shows_everything_again(root: Path) -> None:
    async with open_curves(root) as (pilot, screen):
        before = chart(screen).shown
        for key in ("0", "home"):
            await pilot.press("plus", "up", "y")
            await until(pilot, lambda: screen.window.y is not None)
            await pilot.press(key)
            assert chart(screen).shown == before, key
            assert screen.window.following, key


@pytest.mark.parametrize(
    ("keys", "x", "y"),
    [
        (["plus", "y"], (150, 150 + 1e-6), (3, 3 + 1e-8)),
        (["minus", "Y"], (-1e301, 1e301), (-1e301, 1e301)),
    ],
)
async def test_zooming_ends_where_numbers_end(root: Path, keys: list[str], x: Range, y: Range) -> None:
    """Starting from a window that is reached by many key presses."""
    async with open_curves(root) as (pilot, screen):
        screen._set_window(x=x, y=y, following=False)
        await pilot.press(*keys * 8)
        there = chart(screen).shown
        assert there.x != x and there.y != y
        await pilot.press(*keys)
        assert chart(screen).shown == there
        assert there.y is not None and is_drawable(there.x) and is_drawable(there.y)


async def test_minus_zooms_out(root: Path) -> None:
    async with open_curves(root) as (pilot, screen):
        await pilot.press("minus")
        await until(pilot, lambda: chart(screen).shown.x[1] > 300)


async def test_values_zoom_alone(root: Path) -> None:
    async with open_curves(root) as (pilot, screen):
        for key, factor in (("y", 0.7), ("Y", 1.43)):
            low, high = chart(screen)._y
            await pilot.press(key)
            await until(pilot, lambda high=high: chart(screen)._y[1] != high)  # type: ignore[misc]
            assert chart(screen)._y[1] - chart(screen)._y[0] == pytest.approx((high - low) * factor)
            assert chart(screen).shown.x == (1, 300)


async def test_up_and_down_pan_the_values(root: Path) -> None:
    async with open_curves(root) as (pilot, screen):
        low = chart(screen)._y[0]
        await pilot.press("up")
        await until(pilot, lambda: chart(screen)._y[0] > low)
        await pilot.press("down")
        await until(pilot, lambda: chart(screen)._y[0] == pytest.approx(low))


async def test_the_cursor_reads_what_the_log_says(root: Path) -> None:
    async with open_curves(root) as (pilot, screen):
        await pilot.press("c")
        step = int(screen.window.cursor or 0)
        assert 1 < step < 300
        await pilot.press("right", "left", "right")
        step = int(screen.window.cursor or 0)
        assert screen.window.following
        for stage in ("finetune_full", "finetune_lora"):
            loss = read_steps(root / "runs" / stage / "loss.csv")[step - 1].loss
            assert f"{loss:.4g}" in status_line(screen)
        assert f"step {step}:" in status_line(screen)
        await pilot.press("c")
        assert "step" not in status_line(screen)


async def test_the_cursor_stays_among_the_steps(root: Path) -> None:
    async with open_curves(root) as (pilot, screen):
        for at, key, end in ((290, "right", 300), (10, "left", 1)):
            screen._set_window(cursor=at)
            await pilot.press(*[key] * 5)
            assert screen.window.cursor == end


async def test_a_click_sets_the_cursor_and_a_drag_pans(root: Path) -> None:
    async with open_curves(root, (120, 40)) as (pilot, screen):
        await pilot.click("#loss #plot", offset=(20, 5))
        await until(pilot, lambda: screen.window.cursor is not None)
        width = chart(screen).columns / 2
        assert screen.window.cursor == round(1 + 299 * 19.5 / width)
        await pilot.mouse_down("#loss #plot", offset=(40, 5))
        await pilot.hover("#loss #plot", offset=(30, 5))
        await pilot.mouse_up("#loss #plot", offset=(30, 5))
        before = screen.window.cursor
        await pilot.pause()
        assert screen.window.cursor == before


async def test_the_wheel_zooms_and_freezes(root: Path) -> None:
    from textual.events import MouseScrollUp

    async with open_curves(root) as (pilot, screen):
        await pilot._post_mouse_events([MouseScrollUp], "#loss #plot", offset=(30, 5), button=0)
        await until(pilot, lambda: not screen.window.following)
        low, high = chart(screen).shown.x
        assert 1 < low < high < 300


async def test_brackets_change_the_smoothing(root: Path) -> None:
    async with open_curves(root) as (pilot, screen):
        line = next(iter(screen.runs.views.values())).log.series["loss"]
        await pilot.press("right_square_bracket")
        assert "smoothing 0.95" in status_line(screen)
        await pilot.press(*["left_square_bracket"] * 9)
        assert "smoothing 0 " in status_line(screen) + " "
        line = next(iter(screen.runs.views.values())).log.series["loss"]
        assert list(line.smooth) == list(line.y)


async def test_a_low_terminal_has_room_for_one_panel(root: Path) -> None:
    async with open_curves(root) as (pilot, screen):
        assert panels(screen) == ["loss"]
        await pilot.press("r")
        assert panels(screen) == ["loss", "learning_rate"]
        await pilot.press("g")
        assert panels(screen) == ["loss", "grad_norm"]
        await pilot.press("g", "d")
        assert panels(screen) == ["loss"], "no run has a divergence"


async def test_a_high_terminal_shows_both_panels(root: Path) -> None:
    async with open_curves(root, (200, 60)) as (pilot, screen):
        assert panels(screen) == ["loss", "learning_rate", "grad_norm"]
        await pilot.press("r")
        assert panels(screen) == ["loss", "grad_norm"]


async def test_evaluations_are_drawn_beside_the_loss_of_the_runs_that_have_them(root: Path) -> None:
    write_measured(root, every=30)
    async with open_curves(root) as (pilot, screen):
        result = {
            line.view.run.stage: line.curve("loss", (1, 300), 152).held_out
            for line in screen.runs.lines(screen._pointed)
        }
        assert [column.x for column in result["finetune_lora"]] == list(range(30, 301, 30))
        assert not result["finetune_full"] and not result["finetune_freeze"]
        assert "× on held-out examples" in title(screen)
        assert "held out 0.3" in list_text(screen) and list_text(screen).count("held out") == 1
        await pilot.press("c", "l", "plus", "0")
        loss = read_steps(root / "runs/finetune_lora/loss.csv")
        held_out = next(
            s.eval_loss for s in reversed(loss[: int(screen.window.cursor or 0)]) if s.eval_loss is not None
        )
        assert f"held out {held_out:.4g}" in status_line(screen) and status_line(screen).count("held out") == 1


async def test_marks_of_evaluations_are_in_the_chart_and_differ_from_the_line(root: Path) -> None:
    write_measured(root, every=60)
    async with open_curves(root, (120, 40)) as (pilot, screen):
        canvas = screen.query_one("#loss #plot")
        plot = "".join(strip.text for strip in canvas.render_lines(canvas.size.region))
        assert plot.count("×") == 5
        assert re.search("([⠁-⣿]{2} ){2}", plot), "a dashed line from one to the next"
        for key in screen.runs.views:
            if "lora" in key:
                screen.runs.toggle(key)
        screen.redraw()
        await pilot.pause()
        assert "held-out" not in title(screen)


async def test_divergence_has_a_panel_where_a_run_that_is_shown_measured_it(root: Path) -> None:
    folder = write_measured(root)
    async with open_curves(root) as (pilot, screen):
        await pilot.press("d")
        assert panels(screen) == ["loss", "divergence"]
        series = screen.runs.views[str(folder)].log.series["divergence"]
        assert [step.divergence for step in read_steps(folder / "loss.csv")] == list(series.y)
        assert "divergence 0.01987" in list_text(screen)
        await until(pilot, lambda: "Divergence" in footer_keys(screen))
        screen.runs.toggle(str(folder))
        screen.redraw()
        assert panels(screen) == ["loss"]
        await until(pilot, lambda: "Divergence" not in footer_keys(screen))


async def test_a_log_with_other_columns_takes_the_place_of_one_and_half_a_line_waits(root: Path) -> None:
    log = root / "runs/finetune_lora/loss.csv"
    async with open_curves(root) as (pilot, screen):
        view = screen.runs.views[str(log.parent)]
        plain = log.read_text(encoding="utf-8")
        text = measured(plain, 300)
        log.write_text(text[: -len("0.01986524") - 4], encoding="utf-8")  # within the last evaluation
        await until(pilot, lambda: len(view.log.steps) == 299)
        await wait_until_drawn(pilot, screen)
        assert len(view.log.series["divergence"].y) == 299 and not view.log.series["eval_loss"].y
        log.write_text(text, encoding="utf-8")
        await until(pilot, lambda: list(view.log.series["eval_loss"].x) == [300])
        log.write_text(plain, encoding="utf-8")
        await until(pilot, lambda: not view.log.series["divergence"].y)
        assert len(view.log.steps) == 300


async def test_the_curve_moves_while_the_run_goes_on(empty: Path) -> None:
    folder = write_run(empty, "finetune_lora", 20, "running")
    with hold(folder):
        async with open_curves(empty, (160, 40)) as (pilot, screen):
            assert chart(screen).shown.x == (1, 20)
            assert "live" in list_text(screen)
            assert "20/300" in list_text(screen)
            assert "32 tok/s" in list_text(screen)
            assert "2 min 20 s left" in list_text(screen)  # 280 steps of half a second
            assert "1.94 MiB predicted, 1.94 MiB measured" in list_text(screen)
            with (folder / "loss.csv").open("a", encoding="utf-8") as file:
                file.write(lines(6.0, 21, 40))
            await until(pilot, lambda: chart(screen).shown.x == (1, 40))
            assert "40/300" in list_text(screen)


async def test_a_frozen_picture_stays_while_the_run_goes_on(empty: Path) -> None:
    folder = write_run(empty, "finetune_lora", 20, "running")
    async with open_curves(empty) as (pilot, screen):
        await pilot.press("plus")
        await until(pilot, lambda: not screen.window.following)
        before = chart(screen).shown.x
        with (folder / "loss.csv").open("a", encoding="utf-8") as file:
            file.write(lines(6.0, 21, 40))
        await until(pilot, lambda: "40/300" in list_text(screen))
        assert chart(screen).shown.x == before


async def test_how_a_run_ended_is_shown(empty: Path) -> None:
    write_run(empty, "finetune_full", 20, "done")
    write_run(empty, "finetune_freeze", 20, "stopped")
    write_run(empty, "finetune_lora", 20, "failed", "the loss is nan")
    async with open_curves(empty) as (_, screen):
        rows = [" ".join(option.split()) for option in options(screen)]
        for stage, word, message in (
            ("finetune_full", "finished", False),
            ("finetune_freeze", "stopped", False),
            ("finetune_lora", "failed", True),
        ):
            row = next(text for text in rows if stage in text)
            assert (word in row, "the loss is nan" in row) == (True, message), row


async def test_a_run_whose_process_is_gone_has_died(empty: Path) -> None:
    folder = write_run(empty, "finetune_lora", 20, "running")
    async with open_curves(empty) as (pilot, screen):
        assert "died" in list_text(screen)
        assert "last checkpoint" in list_text(screen)
        with hold(folder):
            await until(pilot, lambda: "live" in list_text(screen))
            journal(folder, "done", 20)
            await until(pilot, lambda: "finished" in list_text(screen))


async def test_a_truncated_replaced_or_deleted_log_is_reported(empty: Path) -> None:
    folder = write_run(empty, "finetune_lora", 100, "done")
    async with open_curves(empty) as (pilot, screen):
        (folder / "loss.csv").write_text(HEADER + lines(6.0, 1, 30), encoding="utf-8")
        await until(pilot, lambda: "restarted" in list_text(screen))
        assert chart(screen).shown.x == (1, 30)
        (folder / "new").write_text(HEADER + lines(5.0, 1, 50), encoding="utf-8")
        (folder / "new").replace(folder / "loss.csv")
        await until(pilot, lambda: "replaced" in list_text(screen))
        assert chart(screen).shown.x == (1, 50)
        (folder / "loss.csv").unlink()
        await until(pilot, lambda: not screen.runs.views)
        assert screen.query_one("#nothing").display


async def test_a_half_written_line_waits_and_a_foreign_one_is_counted(empty: Path) -> None:
    folder = write_run(empty, "finetune_lora", 20, "done")
    async with open_curves(empty) as (pilot, screen):
        with (folder / "loss.csv").open("a", encoding="utf-8") as file:
            file.write("what is this\n" + lines(6.0, 21, 21)[:-4])
        await until(pilot, lambda: "1 foreign lines" in list_text(screen))
        assert chart(screen).shown.x == (1, 20)
        with (folder / "loss.csv").open("a", encoding="utf-8") as file:
            file.write(lines(6.0, 21, 21)[-4:])
        await until(pilot, lambda: chart(screen).shown.x == (1, 21))


async def test_a_broken_params_file_does_not_hide_the_runs(root: Path) -> None:
    (root / "params.yaml").write_text("a: [", encoding="utf-8")
    async with open_curves(root) as (_, screen):
        assert len(screen.runs.views) == 3


ODD = {
    "one point": "1,1,0.5,0.001,0.1,16\n",
    "all equal": "".join(f"{n},1,0.5,0.001,0.1,16\n" for n in range(1, 50)),
    "not finite": "1,1,nan,0.001,inf,16\n2,1,inf,0.001,nan,32\n3,1,0.5,0.001,0.1,48\n",
    "only nan": "1,1,nan,nan,nan,16\n",
    "nothing": "",
    "zero and below": "1,1,0,0.001,0,16\n2,1,-3,0.001,0,32\n3,2,1,0,0,48\n",
    "strange evaluations": "1,1,1,1,1,16,nan,\n2,1,1,1,1,32,inf,-1\n3,1,1,1,1,48,1e300,0\n4,1,1,1,1,64,-2,nan\n",
    "huge": "1,1,1e300,1e300,1e300,16\n2,1,-1e300,1e-300,1e-300,32\n",
}


@pytest.mark.parametrize("text", ODD.values(), ids=ODD.keys())
async def test_odd_logs_are_drawn(empty: Path, text: str) -> None:
    folder = write_run(empty, "finetune_lora", 1)
    header = measured(HEADER) if text.split("\n")[0].count(",") > 5 else HEADER
    (folder / "loss.csv").write_text(header + text, encoding="utf-8")
    keys = ("l", "c", "r", "plus", "left", "minus", "y", "Y", "up", "0", "l", "g", "right_square_bracket")
    async with open_curves(empty, (80, 24)) as (pilot, screen):
        for size, pressed in (((80, 24), keys), ((30, 10), ("l", "plus")), ((200, 60), ("0", "l"))):
            await pilot.resize_terminal(*size)
            await pilot.press(*pressed)
            x, y = chart(screen).shown.x, chart(screen)._y
            assert (x[0] < x[1], y[0] < y[1]) == (True, True), size


async def test_ten_long_runs_at_once(root: Path) -> None:
    from pipeline.files.artifact import file_digest, write_json

    for number in range(10):
        folder = root / f".lora-cache/finetune_lora/{number:08}"
        folder.mkdir(parents=True)
        rows = 100_000 if number == 0 else 5_000
        text = "".join(f"{n},{n // 1000},{number + 1 / n:.6g},0.001,1,{n}\n" for n in range(1, rows + 1))
        (folder / "loss.csv").write_text(HEADER + text, encoding="utf-8")
        digest = file_digest(folder / "loss.csv")
        write_json(folder / "manifest.json", {"params": {"rank": number + 10}, "files": {"loss.csv": digest}})
    async with open_curves(root) as (pilot, screen):
        await to_the_list(pilot, screen)
        for number, view in enumerate(screen.runs.views.values()):
            if "rank" in view.run.label:
                screen.query_one(RunList).highlighted = number
                await pilot.press("space")
        await until(pilot, lambda: len(screen.runs.shown) == 13)
        await wait_until_drawn(pilot, screen)
        assert chart(screen).shown.x == (1, 100_000)
        assert len({screen.runs.looks[key] for key in screen.runs.shown}) == 13


async def ask_for(pilot: Pilot[Any], path: str, kind: str = "svg") -> None:
    """Press x and fill in the dialog."""
    await pilot.press("x")
    await until(pilot, lambda: isinstance(pilot.app.screen, ExportScreen))
    if kind != "svg":
        pilot.app.screen.query_one(f"#{kind}", RadioButton).value = True
        await pilot.pause()
    pilot.app.screen.query_one(Input).value = path
    await pilot.press("enter")


async def test_csv_has_every_row_of_the_visible_runs(root: Path) -> None:
    async with open_curves(root) as (pilot, screen):
        await ask_for(pilot, "all.csv", "csv")
        await until(pilot, lambda: (root / "all.csv").exists())
        assert isinstance(pilot.app.screen, CurvesScreen), screen
    with (root / "all.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    steps = read_steps(root / "runs/finetune_lora/loss.csv")
    ours = [row for row in rows if row["run"] == "finetune_lora"]
    assert [(int(r["step"]), int(r["epoch"]), float(r["loss"]), int(r["tokens"])) for r in ours] == [
        (step.step, step.epoch, step.loss, step.tokens) for step in steps
    ]
    assert len(rows) == 3 * len(steps)


async def test_csv_has_the_optional_columns_of_the_runs_that_have_them(root: Path) -> None:
    folder = write_measured(root)
    async with open_curves(root) as (pilot, _):
        await ask_for(pilot, "all.csv", "csv")
        await until(pilot, lambda: (root / "all.csv").exists())
    with (root / "all.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    ours = [(r["eval_loss"], r["divergence"]) for r in rows if r["run"] == "finetune_lora"]
    assert [tuple(float(cell) if cell else None for cell in row) for row in ours] == [
        (step.eval_loss, step.divergence) for step in read_steps(folder / "loss.csv")
    ]
    assert {(r["eval_loss"], r["divergence"]) for r in rows if r["run"] != "finetune_lora"} == {("", "")}


async def test_an_exported_picture_has_the_evaluations_too(root: Path) -> None:
    write_measured(root)
    async with open_curves(root) as (pilot, screen):
        await pilot.press("d")
        picture: Any = screen._chart_data("svg")
        loss, divergence = picture["panels"]
        assert [len(curve["held_out"]["x"]) for curve in loss["curves"]] == [0, 0, 10]
        assert [len(curve["held_out"]["x"]) for curve in divergence["curves"]] == [0, 0, 0]
        assert divergence["title"] == "divergence from the base (nats per token)"
        drawn = await export.render_chart(picture)
    assert b"finetune_lora, held out" in drawn or drawn.count(b"<use") > 10


@pytest.mark.parametrize(("kind", "start"), [("svg", b"<?xml"), ("png", b"\x89PNG")])
async def test_pictures_are_written(root: Path, kind: str, start: bytes) -> None:
    async with open_curves(root, (200, 60)) as (pilot, _):
        await pilot.press("l")
        await ask_for(pilot, f"out.{kind}", kind)
        await until(pilot, lambda: (root / f"out.{kind}").exists(), 60)
    assert (root / f"out.{kind}").read_bytes().startswith(start)


async def test_the_picture_is_what_is_on_the_screen(root: Path) -> None:
    async with open_curves(root) as (pilot, screen):
        await pilot.press("l", "plus", "y", "g")
        await until(pilot, lambda: screen.window.y is not None)
        picture: Any = screen._chart_data("svg")
        view = chart(screen).shown
        loss, norm = picture["panels"]
        assert picture["x"] == view.x
        assert view.y is not None
        assert loss["y"] == pytest.approx([10**end for end in view.y])
        assert (loss["log"], norm["log"], norm["title"]) == (True, False, "gradient norm")
        assert [curve["sign"] for curve in loss["curves"]] == ["●", "▲", "■"]
        assert all("flat from epoch" in curve["label"] for curve in loss["curves"])


async def test_the_form_proposes_a_free_name_and_follows_the_format(root: Path) -> None:
    (root / "curves.svg").touch()
    async with open_curves(root) as (pilot, _):
        await pilot.press("x")
        await until(pilot, lambda: isinstance(pilot.app.screen, ExportScreen))
        field = pilot.app.screen.query_one(Input)
        assert field.value == "curves-2.svg"
        pilot.app.screen.query_one("#png", RadioButton).value = True
        await until(pilot, lambda: field.value == "curves.png")
        field.value = "mine/loss.txt"
        await pilot.press("enter")
        await pilot.pause()
        assert isinstance(pilot.app.screen, ExportScreen)
        assert "must end in" in str(pilot.app.screen.query_one("#note", Static).render())
        await pilot.press("escape")
        await until(pilot, lambda: isinstance(pilot.app.screen, CurvesScreen))


async def test_nothing_to_export_is_a_warning(empty: Path) -> None:
    async with open_curves(empty) as (pilot, screen):
        await pilot.press("x")
        assert "nothing to export" in screen.workbench.message_history[-1][2]


async def test_a_full_disk_is_one_message_and_no_half_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    (root / "all.csv").write_text("before", encoding="utf-8")
    before = sorted(path.name for path in root.iterdir())
    async with open_curves(root) as (pilot, screen):
        await ask_for(pilot, "all.csv", "csv")
        await until(pilot, lambda: screen.workbench.message_history)
        assert [severity for _, severity, _ in screen.workbench.message_history] == ["error"]
        assert "No space left" in screen.workbench.message_history[-1][2]
    assert sorted(path.name for path in root.iterdir()) == before
    assert (root / "all.csv").read_text(encoding="utf-8") == "before"


async def test_a_picture_that_cannot_be_drawn_is_one_message(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tui.screens.curves.export.sys.executable", "/bin/false")
    async with open_curves(root) as (pilot, screen):
        await ask_for(pilot, "out.svg")
        await until(pilot, lambda: screen.workbench.message_history)
        assert "could not be drawn" in screen.workbench.message_history[-1][2]
    assert not (root / "out.svg").exists()


def answers_shown(screen: CurvesScreen) -> str:
    return str(screen.query_one("#samples Static", Static).render())


async def test_samples_are_those_of_the_cursor_or_the_newest(empty: Path) -> None:
    folder = write_run(empty, "finetune_lora")
    write_run(empty, "finetune_full")
    async with open_curves(empty) as (pilot, screen):
        assert "Samples" not in footer_keys(screen)
        write_samples(folder, {100: "der lewa", 200: None, 300: "der \x1b[31meuro"})
        await wait_until_drawn(pilot, screen)
        await until(pilot, lambda: "Samples" in footer_keys(screen))
        assert not screen.query_one("#samples").display
        await pilot.press("s")
        assert answers_shown(screen) == "■ finetune_lora, step 300\n  die währung von bulgarien ist → der ␛[31meuro"
        for cursor, answer in ((299, "(not finite)"), (100, "der lewa")):
            screen._set_window(cursor=cursor)
            assert answers_shown(screen).endswith(f"→ {answer}")
        screen._set_window(cursor=99)
        assert answers_shown(screen) == ""
        screen._set_window(cursor=None)
        write_samples(folder, {400: "der euro"})  # begun anew
        await wait_until_drawn(pilot, screen)
        assert answers_shown(screen).splitlines()[0].endswith("step 400")
        (folder / "samples.jsonl").unlink()
        await wait_until_drawn(pilot, screen)
        await until(pilot, lambda: not screen.query_one("#samples").display)


async def test_samples_of_a_sweep_are_those_of_its_best_and_of_the_highlighted(empty: Path) -> None:
    folder = write_sweep(empty, {"rank-1": 5.0, "rank-2": 3.0})
    for name in ("rank-1", "rank-2"):
        write_samples(folder / name, {300: f"of {name}"})
    async with open_curves(empty) as (pilot, screen):
        await pilot.press("s")
        assert "of rank-2" in answers_shown(screen) and "of rank-1" not in answers_shown(screen)
        await to_the_list(pilot, screen)
        await pilot.press("enter", "down")
        await until(pilot, lambda: "of rank-1" in answers_shown(screen))
