"""The curves screen: which runs are on, what is drawn of them, the keys and the mouse."""

import json
import threading
from pathlib import Path

import pytest

from pipeline.project.logs.run_log import read_steps
from pipeline.views.runs import discover_runs
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
    small_plots,
    small_text,
    title,
    wait_until_drawn,
    window,
)
from tests.helpers.pilot import screen_opens, screen_text, until
from tests.helpers.run_folders import (
    HEADER,
    hold,
    measured,
    write_measured,
    write_run,
    write_samples,
)
from tui.app import Workbench
from tui.panes.plot.scale import Range, is_drawable
from tui.panes.plot.series import Line
from tui.screens.curves.screen import CurvesScreen

METHODS = {"full", "freeze", "lora"}


async def test_without_runs_it_says_what_to_do(empty: Path) -> None:
    async with open_curves(empty) as (_, screen):
        assert screen.table.has_focus and not screen.plots.display
        assert "No runs yet. R runs the pipeline" in screen_text(screen.app)


async def test_a_first_run_takes_the_place_of_the_hint(empty: Path) -> None:
    async with open_curves(empty) as (pilot, screen):
        write_run(empty, "pretrain", 10)
        await until(pilot, lambda: screen.plots.display)
        await wait_until_drawn(pilot, screen)
        assert screen.focused is screen.table
        assert names_on(screen) == {"pretrain"}


@pytest.mark.slow
@pytest.mark.usefixtures("held_threads")
async def test_before_the_first_search_for_runs_there_is_no_hint_and_the_list_keeps_the_focus(
    three_runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a slow disk, the layout is drawn before the runs are found; this must not look like a
    project without runs.
    """
    discover, ready = discover_runs, threading.Event()
    monkeypatch.setattr(
        "pipeline.views.curves.discover_runs", lambda *args: ready.wait(30) and discover(*args)
    )
    app = Workbench(three_runs / "params.yaml")
    async with app.run_test() as pilot:
        await pilot.press("2")
        screen = await screen_opens(pilot, CurvesScreen)
        await pilot.resize_terminal(90, 30)
        assert screen.focused is screen.table
        assert "No runs yet" not in screen_text(app)
        ready.set()
        await wait_until_drawn(pilot, screen)
        assert names_on(screen) == METHODS


# Which runs are on


async def test_on_are_the_latest_runs_of_the_methods(three_runs: Path) -> None:
    write_run(three_runs, "pretrain")
    write_run(three_runs, "train_from_scratch")
    async with open_curves(three_runs) as (_, screen):
        assert names_on(screen) == {*METHODS, "scratch"}
        assert "· pretrain" in list_text(screen)


async def test_a_run_that_starts_is_added_and_stays(three_runs: Path) -> None:
    async with open_curves(three_runs) as (pilot, screen):
        await point_to(pilot, screen, "full")
        await pilot.press("space")
        assert names_on(screen) == {"freeze", "lora"}
        with hold(write_run(three_runs, "pretrain", 20, "running")):
            await until(pilot, lambda: names_on(screen) == {"freeze", "lora", "pretrain"})
            assert screen.plots.curves[-1].label == "pretrain", "on top"
        await until(pilot, lambda: "died" in details_text(screen) or "✗" in list_text(screen))
        assert names_on(screen) == {"freeze", "lora", "pretrain"}


async def test_a_run_that_is_off_is_on_again_when_it_starts_anew(three_runs: Path) -> None:
    async with open_curves(three_runs) as (pilot, screen):
        await point_to(pilot, screen, "lora")
        await pilot.press("space")
        assert names_on(screen) == {"full", "freeze"}
        with hold(write_run(three_runs, "finetune_lora", 20, "running")):
            await until(pilot, lambda: names_on(screen) == METHODS)


async def test_the_cursor_begins_on_what_is_running(three_runs: Path) -> None:
    with hold(write_run(three_runs, "finetune_lora", 20, "running")):
        async with open_curves(three_runs) as (pilot, screen):
            await until(
                pilot, lambda: details_text(screen).startswith("■ finetune_lora\n▶ running")
            )


async def test_space_enter_and_a_click_switch_a_run(three_runs: Path) -> None:
    async with open_curves(three_runs) as (pilot, screen):
        await pilot.press("g", "space")
        await until(pilot, lambda: names_on(screen) == {"freeze", "lora"})
        assert list_lines(screen)[0].startswith("· full")
        await pilot.press("enter")
        await until(pilot, lambda: names_on(screen) == METHODS)
        await pilot.click(screen.table, offset=(2, 1))  # points to it
        await pilot.click(screen.table, offset=(2, 1), times=1)
        await until(pilot, lambda: names_on(screen) == {"full", "lora"})


async def test_the_filter_narrows_the_list_and_nothing_else(three_runs: Path) -> None:
    async with open_curves(three_runs) as (pilot, screen):
        await pilot.press("slash", *"lor")
        await until(pilot, lambda: len(list_lines(screen)) == 1)
        assert names_on(screen) == METHODS
        await pilot.press("escape")
        await until(pilot, lambda: len(list_lines(screen)) == 3)


@pytest.mark.parametrize("run", ["finetune_lora", "lora"])
async def test_another_screen_can_ask_for_a_run(three_runs: Path, run: str) -> None:
    async with open_curves(three_runs) as (pilot, screen):
        screen.workbench.go("curves", run=run)
        await until(
            pilot,
            lambda: screen.plots.curves[-1].label == "lora" and screen.plots.pointed is not None,
        )
        assert details_text(screen).startswith("■ finetune_lora")


async def test_o_opens_the_stage_and_i_tells_all(three_runs: Path) -> None:
    async with open_curves(three_runs) as (pilot, screen):
        asked: list[dict[str, str]] = []
        screen.workbench.go = lambda name, **request: asked.append({"screen": name, **request})  # type: ignore[method-assign, assignment]
        await point_to(pilot, screen, "lora")
        await pilot.press("o")
        assert asked == [{"screen": "pipeline", "stage": "finetune_lora"}]
        await pilot.press("i")
        assert pilot.app.screen is not screen


# What is drawn


async def test_each_line_has_its_name_and_value_beside_its_end(three_runs: Path) -> None:
    async with open_curves(three_runs) as (_, screen):
        for sign, name in (("●", "full"), ("▲", "freeze"), ("■", "lora")):
            curve = next(curve for curve in screen.plots.curves if curve.label == name)
            value = curve.value("loss", None)
            assert value is not None
            assert f"{sign} {name}" in chart_text(screen) and f"{value:.3g}" in chart_text(screen)


async def test_the_run_under_the_cursor_is_on_top_and_bold(three_runs: Path) -> None:
    async with open_curves(three_runs) as (pilot, screen):
        for name in ("full", "lora", "freeze"):
            await point_to(pilot, screen, name)
            lines = [line for line in screen.plots.chart.shown if isinstance(line, Line)]
            assert screen.plots.curves[-1].label == name
            assert [line.bold for line in lines] == [False, False, True]


async def test_the_scale_is_logarithmic_where_a_decade_is_spanned_and_l_switches(
    three_runs: Path,
) -> None:
    async with open_curves(three_runs) as (pilot, screen):
        assert ranges(screen)[1][1] < 1.2, "exponents of ten"
        assert " log " in title(screen)
        await pilot.press("l")
        assert ranges(screen)[1][1] > 3 and "linear" in title(screen)
        await pilot.press("l")
        assert " log " in title(screen)


async def test_the_scale_is_linear_where_the_values_are_close(empty: Path) -> None:
    folder = write_run(empty, "finetune_lora", 1)
    rows = "".join(f"{n},1,{1 + n / 100},0.001,1,{n}\n" for n in range(1, 50))
    (folder / "loss.csv").write_text(HEADER + rows, encoding="utf-8")
    async with open_curves(empty) as (_, screen):
        assert "linear" in title(screen)


async def test_what_is_constant_is_a_number_and_what_is_not_is_a_plot(three_runs: Path) -> None:
    async with open_curves(three_runs) as (_, screen):
        *_, numbers = small_text(screen).splitlines()
        assert (
            "learning rate 0.001" in numbers
            and "tokens/s 32" in numbers
            and "memory 1.94 MiB" in numbers
        )
        assert (
            "grad norm" in small_text(screen).splitlines()[0]
            and "learning rate" not in small_text(screen)[:40]
        )


async def test_enter_enlarges_a_plot_and_escape_brings_the_loss_back(three_runs: Path) -> None:
    write_measured(three_runs)
    async with open_curves(three_runs) as (pilot, screen):
        screen.set_focus(small_plots(screen)["divergence"])
        await pilot.press("right", "enter")
        await until(pilot, lambda: title(screen).startswith("Gradient norm"))
        assert small_text(screen).startswith("loss")
        await pilot.press("escape")
        await until(pilot, lambda: title(screen).startswith("Loss"))
        await pilot.click(small_plots(screen)["divergence"], offset=(3, 2))
        await until(pilot, lambda: title(screen).startswith("Divergence"))


@pytest.mark.parametrize(
    ("size", "plots"),
    [((200, 60), True), ((120, 40), True), ((80, 24), False)],
    ids=["huge", "wide", "small"],
)
async def test_where_there_is_no_room_for_plots_there_are_sparklines(
    three_runs: Path, size: tuple[int, int], plots: bool
) -> None:
    write_measured(three_runs)
    async with open_curves(three_runs, size) as (_, screen):
        small = small_text(screen)
        assert ("⠒" in small or "⣀" in small) == plots
        assert any(block in small for block in "▂▃▄▅▆▇█") != plots
        assert "divergence" in small and "grad norm" in small and "learning rate 0.001" in small


async def test_evaluations_are_marked_on_the_runs_that_have_them(three_runs: Path) -> None:
    write_measured(three_runs, every=30)
    async with open_curves(three_runs) as (pilot, screen):
        assert chart_text(screen).count("×") == 10 and "× held out" in title(screen)
        await point_to(pilot, screen, "lora")
        assert "held-out loss 0.3693" in details_text(screen)
        await pilot.press("space")
        await until(
            pilot, lambda: "×" not in chart_text(screen) and "held out" not in title(screen)
        )


async def test_divergence_has_a_plot_where_a_run_that_is_on_measured_it(three_runs: Path) -> None:
    folder = write_measured(three_runs)
    async with open_curves(three_runs) as (pilot, screen):
        assert "divergence" in small_text(screen)
        series = screen.runs.views[str(folder)].best.log.series["divergence"]
        assert [step.divergence for step in read_steps(folder / "loss.csv")] == list(series.y)
        await point_to(pilot, screen, "lora")
        await pilot.press("space")
        await until(pilot, lambda: "divergence" not in small_text(screen))


async def test_right_answers_have_a_plot_where_a_run_that_is_on_counted_them(
    three_runs: Path,
) -> None:
    folder = three_runs / "runs/finetune_lora"
    header, *rows = (folder / "loss.csv").read_text(encoding="utf-8").splitlines()
    lines = [f"{header},eval_answers"]
    for step, row in enumerate(rows, 1):
        lines.append(f"{row},{step / 300}" if step % 60 == 0 else f"{row},")
    (folder / "loss.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    async with open_curves(three_runs) as (pilot, screen):
        assert small_text(screen).split()[:2] == ["answers", "100%"]
        series = screen.runs.views[str(folder)].best.log.series["eval_answers"]
        counted = [
            step for step in read_steps(folder / "loss.csv") if step.eval_answers is not None
        ]
        assert [step.step for step in counted] == list(series.x) == [60, 120, 180, 240, 300]
        assert [step.eval_answers for step in counted] == list(series.y)
        await point_to(pilot, screen, "lora")
        await pilot.press("space")
        await until(pilot, lambda: "answers" not in small_text(screen))


async def test_what_preferences_log_has_plots(empty: Path) -> None:
    from pipeline.project.logs.run_log import COLUMNS, OPTIONAL

    folder = write_run(empty, "finetune_lora", 1)
    rows = [f"{n},1,{1 / n},0.001,1,{n},,,{-n},{-2 * n},{n},{n / 50},\n" for n in range(1, 50)]
    (folder / "loss.csv").write_text(
        ",".join((*COLUMNS, *OPTIONAL)) + "\n" + "".join(rows), encoding="utf-8"
    )
    async with open_curves(empty) as (_, screen):
        assert "margin" in small_text(screen) and "accuracy" in small_text(screen)


# Window and cursor


async def test_zoom_and_pan_stay_and_f_follows_with_the_same_width(three_runs: Path) -> None:
    async with open_curves(three_runs) as (pilot, screen):
        screen.set_focus(screen.plots.chart)
        assert ranges(screen)[0] == (1, 300) and "all steps" in title(screen)
        await pilot.press("up")
        await until(pilot, lambda: window(screen).x is not None)
        low, high = ranges(screen)[0]
        assert high - low == pytest.approx(0.7 * 299)
        assert f"steps {low:,.0f} to {high:,.0f}" in title(screen)
        screen.plots.chart.pan(-0.1)  # as a drag does
        await until(pilot, lambda: ranges(screen)[0][0] < low)
        assert ranges(screen)[0] == pytest.approx((low - 0.07 * 299, high - 0.07 * 299))
        await pilot.press("f")
        assert ranges(screen)[0] == pytest.approx((300 - 0.7 * 299, 300))
        assert "last 209 steps" in title(screen)
        await pilot.press("down")
        await until(pilot, lambda: ranges(screen)[0][1] > 300)
        await pilot.press("0")
        assert ranges(screen)[0] == (1, 300) and "all steps" in title(screen)


async def test_values_zoom_and_pan_alone(three_runs: Path) -> None:
    async with open_curves(three_runs) as (pilot, screen):
        screen.set_focus(screen.plots.chart)
        for key, factor, shift in (("v", 0.7, 0.0), ("V", 1.43, 0.0), ("", 1, 0.1), ("", 1, -0.1)):
            low, high = ranges(screen)[1]
            await pilot.press(*[key] * bool(key))
            if not key:
                screen.plots.chart.pan(0, shift)  # as a drag does
            await until(pilot, lambda high=high: ranges(screen)[1][1] != high)  # type: ignore[misc]
            new = ranges(screen)[1]
            assert new[1] - new[0] == pytest.approx((high - low) * factor)
            assert sum(new) / 2 == pytest.approx((low + high) / 2 + shift * (high - low))
            assert ranges(screen)[0] == (1, 300)


@pytest.mark.parametrize(
    ("keys", "x", "y"),
    [
        (["up", "v"], (150, 150 + 1e-6), (3, 3 + 1e-8)),
        (["down", "V"], (-1e301, 1e301), (-1e301, 1e301)),
    ],
    ids=["in", "out"],
)
@pytest.mark.slow
async def test_zooming_ends_where_numbers_end(
    three_runs: Path, keys: list[str], x: Range, y: Range
) -> None:
    """Starting from a window that is reached by many key presses."""
    async with open_curves(three_runs) as (pilot, screen):
        screen.set_focus(screen.plots.chart)
        screen.plots.set_window(x=x, y=y)
        await pilot.press(*keys * 8)
        there = ranges(screen)[0], ranges(screen)[1]
        assert there[0] != x and there[1] != y
        await pilot.press(*keys)
        assert (ranges(screen)[0], ranges(screen)[1]) == there
        assert all(map(is_drawable, there))


async def test_the_step_cursor_reads_what_the_log_says(three_runs: Path) -> None:
    async with open_curves(three_runs) as (pilot, screen):
        await point_to(pilot, screen, "lora")
        await pilot.press(*["left"] * 8)
        step = int(window(screen).cursor or 0)
        assert 250 < step < 300 and f"at step {step}" in title(screen)
        logged = read_steps(three_runs / "runs/finetune_lora/loss.csv")[step - 1]
        assert f"loss {logged.loss:.4g} at step {step}" in details_text(screen)
        curve = screen.plots.curves[-1]
        assert f"{curve.value('loss', step):.3g}" in chart_text(screen) and "│" in small_text(
            screen
        )
        await pilot.press("escape")
        assert window(screen).cursor is None and "│" not in small_text(screen)


@pytest.mark.slow
async def test_the_step_cursor_stays_among_the_steps(three_runs: Path) -> None:
    async with open_curves(three_runs) as (pilot, screen):
        for at, key, end in ((290, "right", 300), (10, "left", 1)):
            screen.plots.set_window(cursor=at)
            await pilot.press(*[key] * 9)
            assert window(screen).cursor == end
        screen.set_focus(screen.plots.chart)
        for key, end in (("end", 300), ("home", 1), ("G", 300), ("g", 1)):
            await pilot.press(key)
            assert window(screen).cursor == end, key


async def test_a_click_sets_the_cursor_and_a_drag_pans(three_runs: Path) -> None:
    async with open_curves(three_runs) as (pilot, screen):
        await pilot.click(screen.plots.chart, offset=(20, 5))
        await until(pilot, lambda: window(screen).cursor is not None)
        assert window(screen).cursor == round(screen.plots.chart.drawing.x_at(20) or 0)
        before = window(screen).cursor
        await pilot.mouse_down(screen.plots.chart, offset=(40, 5))
        await pilot.hover(screen.plots.chart, offset=(30, 5))
        await pilot.mouse_up(screen.plots.chart, offset=(30, 5))
        await pilot.pause()
        assert window(screen).cursor == before


async def test_the_wheel_zooms(three_runs: Path) -> None:
    from textual.events import MouseScrollUp

    async with open_curves(three_runs) as (pilot, screen):
        await pilot._post_mouse_events(
            [MouseScrollUp], screen.plots.chart, offset=(30, 5), button=0
        )
        await until(pilot, lambda: window(screen).x is not None)
        low, high = ranges(screen)[0]
        assert 1 < low < high < 300


async def test_comma_and_full_stop_change_the_smoothing(three_runs: Path) -> None:
    async with open_curves(three_runs, (160, 40)) as (pilot, screen):
        await pilot.press("full_stop")
        await until(pilot, lambda: "smooth 0.95" in title(screen))
        await pilot.press(*["comma"] * 9)
        await until(pilot, lambda: title(screen).endswith("smooth 0"))
        line = next(iter(screen.runs.views.values())).best.log.series["loss"]
        assert list(line.smooth) == list(line.y)


# Answers


@pytest.mark.slow
async def test_answers_are_those_at_the_cursor_or_the_newest(empty: Path) -> None:
    folder = write_run(empty, "finetune_lora")
    write_run(empty, "finetune_full")
    async with open_curves(empty) as (pilot, screen):
        assert not answers_text(screen)
        write_samples(folder, {100: "der lewa", 200: None, 300: "der \x1b[31meuro"})
        await wait_until_drawn(pilot, screen)
        asked = "die währung von bulgarien ist"
        assert answers_text(screen) == f"■ lora  step 300\n  {asked}\n  → der \x1b[31meuro"
        assert "\x1b[31m" not in screen_text(pilot.app)
        for cursor, answer in ((299, "(not finite)"), (100, "der lewa")):
            screen.plots.set_window(cursor=cursor)
            await pilot.pause()
            assert answers_text(screen).endswith(f"→ {answer}")
        screen.plots.set_window(cursor=99)
        await pilot.pause()
        assert answers_text(screen) == ""
        screen.plots.set_window(cursor=None)
        await pilot.pause()
        write_samples(folder, {400: "der euro"})  # begun anew
        await wait_until_drawn(pilot, screen)
        assert answers_text(screen).splitlines()[0].endswith("step 400")
        held_out = {
            "step": 500,
            "prompt": "bulgarien",
            "answer": "der lewa",
            "expected": "der euro",
        }
        (folder / "samples.jsonl").write_text(json.dumps(held_out) + "\n", encoding="utf-8")
        await wait_until_drawn(pilot, screen)
        assert answers_text(screen).endswith("bulgarien\n  ✗ der lewa\n    expected der euro")
        await pilot.press("a")
        assert not answers_text(screen)
        (folder / "samples.jsonl").unlink()
        await wait_until_drawn(pilot, screen)
        await until(pilot, lambda: not any(curve.answers for curve in screen.runs.curves))


# Sizes


@pytest.mark.parametrize("size", [(200, 60), (120, 40), (80, 24), (60, 16), (30, 8)])
async def test_any_size_shows_chart_and_list(three_runs: Path, size: tuple[int, int]) -> None:
    write_measured(three_runs)
    write_samples(three_runs / "runs/finetune_lora", {300: "der euro"})
    async with open_curves(three_runs, size) as (pilot, screen):
        runs = screen.table
        assert screen.plots.chart.size.height > 0 and runs.region.bottom <= size[1]
        assert bool(screen.query_one("#run").size) == (size[0] >= 76)
        assert bool(screen.query_one("#small").size) == (size[1] >= 20)
        await pilot.press("j", "left", "l", "tab", "up", "v", "+", "+")
        await until(
            pilot, lambda: len(chart_text(screen).split("\n")[0]) == screen.plots.chart.size.width
        )


ODD = {
    "one point": "1,1,0.5,0.001,0.1,16\n",
    "all equal": "".join(f"{n},1,0.5,0.001,0.1,16\n" for n in range(1, 50)),
    "not finite": "1,1,nan,0.001,inf,16\n2,1,inf,0.001,nan,32\n3,1,0.5,0.001,0.1,48\n",
    "only nan": "1,1,nan,nan,nan,16\n",
    "nothing": "",
    "zero and below": "1,1,0,0.001,0,16\n2,1,-3,0.001,0,32\n3,2,1,0,0,48\n",
    "strange evaluations": (
        "1,1,1,1,1,16,nan,\n2,1,1,1,1,32,inf,-1\n3,1,1,1,1,48,1e300,0\n4,1,1,1,1,64,-2,nan\n"
    ),
    "huge": "1,1,1e300,1e300,1e300,16\n2,1,-1e300,1e-300,1e-300,32\n",
    "huge steps": "1,1,1,1,1,16\n99999999999999999999,1,1,1,1,32\n",
}


@pytest.mark.parametrize("text", ODD.values(), ids=ODD.keys())
@pytest.mark.sampled(4)
@pytest.mark.slow
async def test_odd_logs_are_drawn(empty: Path, text: str) -> None:
    folder = write_run(empty, "finetune_lora", 1)
    header = measured(HEADER) if text.split("\n")[0].count(",") > 5 else HEADER
    (folder / "loss.csv").write_text(header + text, encoding="utf-8")
    keys = ("l", "left", "left", "up", "down", "v", "V", "0", "l", "full_stop", "end")
    async with open_curves(empty, (80, 24)) as (pilot, screen):
        screen.set_focus(screen.plots.chart)
        for size, pressed in (((80, 24), keys), ((30, 10), ("l", "up")), ((200, 60), ("0", "l"))):
            await pilot.resize_terminal(*size)
            await pilot.press(*pressed)
            x, y = ranges(screen)[0], ranges(screen)[1]
            assert (x[0] < x[1], y[0] < y[1]) == (True, True), size
        for plot in small_plots(screen).values():
            screen.set_focus(plot)
            await pilot.press("enter", "l", "right", "enter", "escape")


@pytest.mark.parametrize(
    "telemetry",
    [
        "1,nan,nan,1,cpu,0,0\n2,inf,1,1,cpu,0,9\n3,1,1,1,cpu,0,9\n",
        "what\n1,2\n",
        "9,1,1,1,cpu,1,1\n1,1,1,1,cpu,1,1\n",
    ],
    ids=["not-finite", "foreign", "backwards"],
)
async def test_odd_telemetry_is_survived(empty: Path, telemetry: str) -> None:
    folder = write_run(empty, "finetune_lora", 20, "running")
    file = folder / "telemetry.csv"
    file.write_text(
        file.read_text(encoding="utf-8").splitlines()[0] + "\n" + telemetry, encoding="utf-8"
    )
    with hold(folder):
        async with open_curves(empty) as (_, screen):
            assert "▶ running · 20 of 300 steps" in details_text(screen)
