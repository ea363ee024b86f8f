"""Runs that change while they are shown: growing, ending, dying, replaced, with half a line."""

from pathlib import Path

import pytest

from tests.helpers.curves import (
    details_text,
    list_lines,
    list_text,
    open_curves,
    point_to,
    ranges,
    title,
    wait_until_drawn,
    window,
)
from tests.helpers.pilot import screen_text, until
from tests.helpers.run_folders import (
    HEADER,
    hold,
    journal,
    lines,
    measured,
    write_run,
)


async def test_the_curve_moves_while_the_run_goes_on(empty: Path) -> None:
    folder = write_run(empty, "finetune_lora", 20, "running")
    with hold(folder):
        async with open_curves(empty) as (pilot, screen):
            assert ranges(screen)[0] == (1, 20)
            assert list_lines(screen) == ["■ lora 4.23 ▶ 7%"]
            assert "▶ running · 20 of 300 steps" in details_text(screen)
            assert "2 min 20 s left" in details_text(screen)  # 280 steps of half a second
            assert "32 tokens/s" in details_text(screen)
            assert "memory 1.94 MiB, predicted 1.94 MiB" in details_text(screen)
            with (folder / "loss.csv").open("a", encoding="utf-8") as file:
                file.write(lines(6.0, 21, 40))
            await until(pilot, lambda: ranges(screen)[0] == (1, 40))
            assert "40 of 300" in details_text(screen)


@pytest.mark.slow
async def test_of_a_run_that_is_resumed_and_has_not_begun_no_end_is_foretold(empty: Path) -> None:
    folder = write_run(empty, "finetune_lora", 20, "running")
    journal(folder, "running", 0, 0)
    with hold(folder):
        async with open_curves(empty) as (pilot, screen):
            assert list_lines(screen) == ["■ lora 4.23 ▶"]
            assert "▶ running · 20 steps" in details_text(screen) and "left" not in details_text(
                screen
            )
            journal(folder, "running", 20, 300)
            await until(pilot, lambda: "20 of 300 steps" in details_text(screen))


@pytest.mark.slow
async def test_chosen_steps_stay_while_the_run_goes_on(empty: Path) -> None:
    folder = write_run(empty, "finetune_lora", 20, "running")
    async with open_curves(empty) as (pilot, screen):
        screen.set_focus(screen.plots.chart)
        await pilot.press("up")
        await until(pilot, lambda: window(screen).x is not None)
        before = ranges(screen)[0]
        with (folder / "loss.csv").open("a", encoding="utf-8") as file:
            file.write(lines(6.0, 21, 40))
        await until(pilot, lambda: "40 of 300" in details_text(screen))
        assert ranges(screen)[0] == before and "steps 4 to 17" in title(screen)


async def test_how_a_run_ended_is_shown(empty: Path) -> None:
    write_run(empty, "finetune_full", 20, "done")
    write_run(empty, "finetune_freeze", 20, "stopped")
    write_run(empty, "finetune_lora", 20, "failed", "the loss is nan")
    async with open_curves(empty) as (pilot, screen):
        full, freeze, lora = list_lines(screen)
        assert "%" not in full and freeze.endswith("‖ 7%") and lora.endswith("✗ 7%")
        for name, word, message in (
            ("full", "finished", False),
            ("freeze", "stopped", False),
            ("lora", "failed", True),
        ):
            await point_to(pilot, screen, name)
            assert (word in details_text(screen), "the loss is nan" in details_text(screen)) == (
                True,
                message,
            )


async def test_a_run_whose_process_is_gone_has_died(empty: Path) -> None:
    folder = write_run(empty, "finetune_lora", 20, "running")
    async with open_curves(empty) as (pilot, screen):
        assert "✗ died" in details_text(screen) and "last checkpoint" in details_text(screen)
        with hold(folder):
            await until(pilot, lambda: "running" in details_text(screen))
            journal(folder, "done", 20)
            await until(pilot, lambda: "finished" in details_text(screen))


@pytest.mark.slow
async def test_a_truncated_replaced_or_deleted_log_is_reported(empty: Path) -> None:
    folder = write_run(empty, "finetune_lora", 100, "done")
    async with open_curves(empty) as (pilot, screen):
        (folder / "loss.csv").write_text(HEADER + lines(6.0, 1, 30), encoding="utf-8")
        await until(pilot, lambda: "restarted" in details_text(screen))
        assert ranges(screen)[0] == (1, 30)
        (folder / "new").write_text(HEADER + lines(5.0, 1, 50), encoding="utf-8")
        (folder / "new").replace(folder / "loss.csv")
        await until(pilot, lambda: "replaced" in details_text(screen))
        assert ranges(screen)[0] == (1, 50)
        (folder / "loss.csv").unlink()
        await until(pilot, lambda: not screen.runs.views)
        assert "No runs yet" in screen_text(pilot.app)


@pytest.mark.slow
async def test_a_half_written_line_waits_and_a_foreign_one_is_counted(empty: Path) -> None:
    folder = write_run(empty, "finetune_lora", 20, "done")
    async with open_curves(empty) as (pilot, screen):
        with (folder / "loss.csv").open("a", encoding="utf-8") as file:
            file.write("what is this\n" + lines(6.0, 21, 21)[:-4])
        await until(pilot, lambda: "1 foreign lines" in details_text(screen))
        assert ranges(screen)[0] == (1, 20)
        with (folder / "loss.csv").open("a", encoding="utf-8") as file:
            file.write(lines(6.0, 21, 21)[-4:])
        await until(pilot, lambda: ranges(screen)[0] == (1, 21))


@pytest.mark.slow
async def test_a_log_with_other_columns_takes_the_place_of_one_and_half_a_line_waits(
    three_runs: Path,
) -> None:
    log = three_runs / "runs/finetune_lora/loss.csv"
    async with open_curves(three_runs) as (pilot, screen):
        view = screen.runs.views[str(log.parent)]
        plain = log.read_text(encoding="utf-8")
        text = measured(plain, 300)
        # within the last evaluation
        log.write_text(text[: -len("0.01986524") - 4], encoding="utf-8")
        await until(pilot, lambda: len(view.best.log.steps) == 299)
        await wait_until_drawn(pilot, screen)
        assert (
            len(view.best.log.series["divergence"].y) == 299
            and not view.best.log.series["eval_loss"].y
        )
        log.write_text(text, encoding="utf-8")
        await until(pilot, lambda: list(view.best.log.series["eval_loss"].x) == [300])
        log.write_text(plain, encoding="utf-8")
        await until(pilot, lambda: not view.best.log.series["divergence"].y)
        assert len(view.best.log.steps) == 300


async def test_a_broken_params_file_does_not_hide_the_runs(three_runs: Path) -> None:
    (three_runs / "params.yaml").write_text("a: [", encoding="utf-8")
    async with open_curves(three_runs) as (_, screen):
        assert len(screen.runs.views) == 3


@pytest.mark.slow
async def test_ten_long_runs_at_once(three_runs: Path) -> None:
    from pipeline.files.artifact import file_digest, write_json

    for number in range(10):
        folder = three_runs / f".lora-cache/finetune_lora/{number:08}"
        folder.mkdir(parents=True)
        rows = 100_000 if number == 0 else 5_000
        text = "".join(
            f"{n},{n // 1000},{number + 1 / n:.6g},0.001,1,{n}\n" for n in range(1, rows + 1)
        )
        (folder / "loss.csv").write_text(HEADER + text, encoding="utf-8")
        digest = file_digest(folder / "loss.csv")
        write_json(
            folder / "manifest.json",
            {"params": {"rank": number + 10}, "files": {"loss.csv": digest}},
        )
    async with open_curves(three_runs) as (pilot, screen):
        assert len(screen.runs.on) == 3, "older runs are off"
        assert sum(line.startswith("· lora rank ") for line in list_lines(screen)) == 10
        for view in screen.runs.views.values():
            screen.runs.switch(view, True)
        screen.files_changed()
        await until(pilot, lambda: ranges(screen)[0] == (1, 100_000))
        await wait_until_drawn(pilot, screen)
        assert len({view.look for view in screen.runs.on}) == 13


async def test_what_an_evaluation_measured_is_shown_as_kept(three_runs: Path) -> None:
    from pipeline.files.artifact import file_digest, seal, sealed_digest, write_json

    log = three_runs / "runs/finetune_lora/loss.csv"
    adapter = three_runs / "artifacts/lora_adapter"
    adapter.mkdir(parents=True)
    (adapter / "loss.csv").write_bytes(log.read_bytes())
    digest = sealed_digest({"files": {"loss.csv": file_digest(log)}})
    async with open_curves(three_runs) as (pilot, screen):
        assert "%" not in list_text(screen)
        seal(adapter, {"params": {}, "kind": "adapter"})
        evaluation = three_runs / "artifacts/evaluation"
        evaluation.mkdir()
        write_json(
            evaluation / "metrics.json",
            {"lora": {"forgetting": {"answers_kept": 0.73, "loss_rise": 1.0}}},
        )
        seal(
            evaluation,
            {
                "variants": {"lora": "artifacts/lora_adapter"},
                "inputs": {"artifacts/lora_adapter": digest},
            },
        )
        await until(pilot, lambda: "■ lora 0.0656 ▆ 73%" in list_lines(screen))
        await point_to(pilot, screen, "lora")
        assert "kept 73% of the old answers" in details_text(screen)
        asked: list[object] = []
        screen.workbench.go = lambda *names, **request: asked.append((*names, request))  # type: ignore[method-assign, assignment]
        await pilot.press("c")
        assert asked == [("chat", {"models": [adapter]})]
        await point_to(pilot, screen, "full")
        await pilot.press("c")
        assert len(asked) == 1 and "no model yet" in screen.workbench.message_history[-1].text
