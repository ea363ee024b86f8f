"""Runs on the pipeline screen: started, followed, stopped; and what goes wrong, each with one true
sentence.
"""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from textual.pilot import Pilot
from textual.widgets import Static

from pipeline.errors import UserError
from pipeline.project.logs.run_state import Journal
from pipeline.stages.registry import GRAPH
from pipeline.views.stages import StageState, Status
from tests.helpers.extension import add_probes
from tests.helpers.pilot import until
from tests.helpers.pipeline_screen import (
    brief_params,
    choose,
    edit,
    facts,
    log_lines,
    messages,
    open_screen,
    row,
    said,
)
from tests.helpers.projects import LORA, save
from tui import app as tui_app
from tui.screens.pipeline.screen import PipelineScreen
from tui.services import pipeline_process
from tui.services.pipeline_process import Runner, Running

WAIT = "import sys, time\nprint('called', *sys.argv[1:], flush=True)\ntime.sleep(60)"
RUN_LORA = f"import subprocess\nsubprocess.run([{LORA!r}, 'finetune', 'freeze'])"


@pytest.fixture
def dvc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Replace dvc by a Python program."""

    def install(code: str) -> None:
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin/dvc").write_text(f"#!{sys.executable}\n{code}", encoding="utf-8")
        (tmp_path / "bin/dvc").chmod(0o755)

    monkeypatch.setattr(pipeline_process, "BIN", tmp_path / "bin")
    return install


@pytest.fixture
def runnable(project: Path) -> Path:
    """A project that `R` can run."""
    (project / "dvc.yaml").write_text("", encoding="utf-8")
    brief_params(project)
    return project


async def stop(pilot: Pilot[None], screen: PipelineScreen) -> None:
    """Stop what runs, and say yes."""
    await until(pilot, lambda: screen.workbench.project_watch.pipeline)
    await pilot.press("X")
    await until(pilot, lambda: len(pilot.app.screen_stack) == 2)
    await pilot.press("y")
    await until(pilot, lambda: screen.workbench.runner.running() is None)
    await until(pilot, lambda: screen.workbench.project_watch.pipeline is None)


def banner(screen: PipelineScreen) -> str:
    widget = screen.query_one("#problem", Static)
    return str(widget.content) if widget.display else ""


# Running


async def test_a_run_is_started_with_the_right_words_and_stopped(
    runnable: Path, dvc: Callable[[str], None]
) -> None:
    dvc(WAIT)
    async with open_screen(runnable) as (pilot, screen):
        await choose(pilot, screen, "finetune_lora")
        await pilot.press("L", "a")
        for key, words in (
            ("R", "repro"),
            ("S", "repro --single-item finetune_lora"),
            ("F", "repro --single-item --force finetune_lora"),
        ):
            await pilot.press(key)
            await until(pilot, partial(printed, screen, f"called {words}"))
            await pilot.press("S")
            assert "already running" in messages(screen)
            await stop(pilot, screen)
        await until(pilot, lambda: "All stages are up to date" in messages(screen))


def printed(screen: PipelineScreen, text: str) -> bool:
    return text in " ".join(line.strip() for line in log_lines(screen))


async def test_run_is_answered_while_something_runs_and_starts_what_the_watch_has_not_seen_end(
    runnable: Path, dvc: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    dvc(WAIT)
    async with open_screen(runnable) as (pilot, screen):
        await pilot.press("X")
        await until(pilot, lambda: "Nothing is running" in messages(screen))
        await pilot.press("R")
        await until(pilot, lambda: screen.workbench.project_watch.pipeline)
        await pilot.press("R")
        await until(pilot, lambda: "already running" in messages(screen))
        await stop(pilot, screen)
        ended = Running(1, "dvc repro", 0.0)
        monkeypatch.setattr(screen.workbench.project_watch, "look_now", lambda: None)
        screen.workbench.project_watch.pipeline = ended
        await pilot.press("R")
        await until(pilot, lambda: messages(screen).count("Started: dvc repro") == 2)
        screen.workbench.runner.stop()


async def test_a_stage_without_its_inputs_says_which(empty: Path) -> None:
    async with open_screen(empty) as (pilot, screen):
        await choose(pilot, screen, "merge")
        await pilot.press("S")
        assert "merge needs expand_vocab, finetune_lora first: press R to run all" in messages(
            screen
        )
        await pilot.press("R")
        await until(pilot, lambda: "has no dvc.yaml" in messages(screen))


@pytest.mark.slow
async def test_one_stage_that_ran_alone_is_reported_alone(
    runnable: Path, dvc: Callable[[str], None]
) -> None:
    """The others being out of date is no early end."""
    save(runnable / "params.yaml", {"finetune_freeze.epochs": 3, "finetune_lora.rank": 2})
    dvc(RUN_LORA)
    async with open_screen(runnable) as (pilot, screen):
        await choose(pilot, screen, "finetune_freeze")
        await pilot.press("S")
        await until(pilot, lambda: "finetune_freeze is up to date." in messages(screen), 30)
        assert "early" not in messages(screen)


@pytest.mark.slow
async def test_a_failed_stage_shows_why_and_is_chosen(
    runnable: Path, dvc: Callable[[str], None]
) -> None:
    """A real stage fails: its message is shown, no matter who ran it."""
    dvc(f"print(\"Running stage 'finetune_freeze':\", flush=True)\n{RUN_LORA}")
    async with open_screen(runnable) as (pilot, screen):
        save(runnable / "params.yaml", {"finetune_freeze.last_blocks": 9})
        await pilot.press("R")
        await until(pilot, lambda: row(screen, "freeze").startswith("✗ freeze failed: "), 30)
        await until(pilot, lambda: screen.chosen == "finetune_freeze")
        await until(
            pilot,
            lambda: "why finetune_freeze.last_blocks must be at most 2" in said(screen),
        )
        assert "next Mend what it says, then S runs it again." in facts(screen)
        await until(pilot, lambda: "finetune_freeze failed" in messages(screen))
        await until(
            pilot,
            lambda: any(line.startswith("error: finetune_freeze") for line in log_lines(screen)),
        )


@pytest.mark.slow
async def test_a_run_elsewhere_is_followed_and_says_whose_it_is(project: Path) -> None:
    brief_params(project)
    async with open_screen(project, (200, 60)) as (pilot, screen):
        await until(pilot, lambda: row(screen, "lora") == "✓ lora")
        # some seconds: a shorter run can end unseen
        save(project / "params.yaml", {"finetune_lora.epochs": 150})
        process = subprocess.Popen(
            [LORA, "finetune", "lora"], cwd=project, stderr=subprocess.DEVNULL
        )
        seen = list[str]()

        def runs() -> bool:  # looked at in one moment: the next may be the run's end
            seen[:] = row(screen, "lora"), screen.chosen, *facts(screen)
            return "% " in seen[0] and "left" in seen[0] and "/900" in seen[2]

        await until(pilot, runs, 30)
        assert seen[1] == "finetune_lora"
        assert (
            f"run in a terminal or by another program: process {process.pid}, since"
            in "\n".join(seen)
        )
        await until(pilot, lambda: process.poll() is not None, 60)
        await until(pilot, lambda: row(screen, "lora") == "✓ lora")
        await until(pilot, lambda: "measured at the peak" in said(screen))


def running(*names: str) -> dict[str, StageState]:
    return {
        name: StageState(
            stage, "running" if name in names else "current", (), Journal("running", 1, 0.0, 1, 9)
        )
        for name, stage in GRAPH.stages.items()
    }


@pytest.mark.slow
async def test_the_cursor_follows_what_runs_until_the_user_moves_it(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_probes(empty, monkeypatch)
    shown: dict[str, StageState] = {}
    monkeypatch.setattr(
        Status, "of", lambda _, project, *__: {n: (shown or running())[n] for n in project.readable}
    )
    async with open_screen(empty, (80, 24)) as (pilot, screen):

        async def now(*names: str) -> None:
            shown.clear()
            shown.update(running(*names))
            # the watch looks
            save(empty / "params.yaml", {"pretrain.seed": len(names) + 7 * ("merge" in names)})
            watch = screen.workbench.project_watch
            await until(
                pilot, lambda: all(watch.states[name] is shown[name] for name in watch.stages)
            )
            await pilot.pause()

        await now("pretrain")
        assert screen.chosen == "pretrain"
        await now("probe_size")  # folded, and below the fold
        assert screen.chosen == "probe_size"
        tree = screen.rows
        await until(pilot, lambda: 0 <= tree.cursor - tree.scroll_offset.y < tree.size.height)
        await pilot.press("k")
        assert screen.chosen == "probe_norm"
        await now("merge")
        assert screen.chosen == "probe_norm"  # the user looks at it
        await now()
        await now("merge", "pretrain")  # another run
        assert screen.chosen == "merge"
        await edit(pilot, screen, "prompts", "x")
        await now("pretrain")
        # nor while something is typed
        assert screen.chosen == "merge" and screen.params.input.value == "x"


@pytest.mark.slow
async def test_a_second_workbench_sees_the_run_and_starts_none(
    runnable: Path, dvc: Callable[[str], None]
) -> None:
    dvc(WAIT)
    first = Runner(runnable)
    first.start(["repro"])
    try:
        async with open_screen(runnable) as (pilot, screen):
            await until(pilot, lambda: screen.workbench.project_watch.pipeline)
            await pilot.press("S")
            already = "The pipeline is already running. Stop it first, or wait for it."
            await until(pilot, lambda: messages(screen) == already)
            first.stop()
            await until(pilot, lambda: first.running() is None)
    finally:
        with suppress(UserError):
            first.stop()


# What goes wrong


@pytest.mark.slow
async def test_params_broken_by_hand_are_reported_and_nothing_runs_until_they_are_mended(
    runnable: Path, dvc: Callable[[str], None]
) -> None:
    path = runnable / "params.yaml"
    text = path.read_text(encoding="utf-8")
    dvc(WAIT)
    async with open_screen(runnable) as (pilot, screen):
        path.write_text("pretrain: [", encoding="utf-8")
        await until(pilot, lambda: "is not valid YAML" in banner(screen))
        assert banner(screen).endswith("Showing the last valid state.")
        for key in ("R", "S", "F"):
            await pilot.press(key)
            assert messages(screen).count("Nothing was started: ") == 1
            assert "is not valid YAML" in messages(screen)
            screen.workbench.message_history.clear()
        assert not (runnable / "runs/pipeline.lock").exists()
        await choose(pilot, screen, "pretrain")
        await edit(pilot, screen, "epochs", "7")
        await pilot.press("enter")
        assert path.read_text(encoding="utf-8") == "pretrain: [" and screen.params.is_typing
        path.write_text(text, encoding="utf-8")
        await until(pilot, lambda: not banner(screen))
        await pilot.press("enter")  # what was typed is still there
        await until(pilot, lambda: "  epochs: 7" in path.read_text(encoding="utf-8"))


@pytest.mark.slow
async def test_it_opens_on_a_broken_and_on_a_missing_file(empty: Path, tmp_path: Path) -> None:
    (empty / "params.yaml").write_text("pretrain: [", encoding="utf-8")
    (tmp_path / "dvc.yaml").touch()  # a project that lost its params
    for root, problem in ((empty, "is not valid YAML"), (tmp_path, "does not exist")):
        async with open_screen(root, (80, 24)) as (pilot, screen):
            assert problem in banner(screen) and "Showing" not in banner(screen)
            await pilot.press(
                "S", "R", "X", "p", "L", "d", "v", "escape", "down", "enter", "enter", "tab", "+"
            )


@pytest.mark.slow
async def test_a_project_that_is_deleted_while_it_is_open_says_so(
    runnable: Path, dvc: Callable[[str], None]
) -> None:
    dvc(WAIT)
    async with open_screen(runnable) as (pilot, screen):
        shutil.rmtree(runnable)
        await until(pilot, lambda: banner(screen))
        assert banner(screen) == f"✗ {runnable} was moved or deleted. Put it back, or quit with q."
        await pilot.press("S", "p", "enter", *"7", "enter", "escape", "L", "d", "v", "escape")
        assert "Nothing was started" in messages(screen)
        assert not runnable.exists()


async def test_a_full_disk_while_saving_is_one_sentence(
    empty: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (empty / "params.yaml").read_bytes()
    async with open_screen(empty) as (pilot, screen):

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
        await choose(pilot, screen, "pretrain")
        await edit(pilot, screen, "epochs", "7")
        await pilot.press("enter")
        await until(pilot, lambda: "No space left" in messages(screen))
        assert messages(screen).count("\n") == 0 and messages(screen).endswith(
            "Nothing was changed."
        )
        assert screen.params.input.value == "7"  # to be written once there is space
    assert (empty / "params.yaml").read_bytes() == before


@pytest.mark.slow
async def test_a_full_disk_before_a_run_is_one_sentence(
    runnable: Path, dvc: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    dvc(WAIT)
    async with open_screen(runnable) as (pilot, screen):

        def full(*_: object) -> None:
            raise OSError(
                errno.ENOSPC, os.strerror(errno.ENOSPC), str(runnable / "runs/pipeline.log")
            )

        monkeypatch.setattr(Runner, "_spawn", full)
        await pilot.press("R")
        await until(pilot, lambda: messages(screen).startswith("No space left on device: "))
        assert "\n" not in messages(screen)


@pytest.mark.slow
async def test_a_run_that_ends_on_a_full_disk_says_so(
    runnable: Path, dvc: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """dvc itself cannot write its lock: no stage failed, and the log may be cut off."""
    save(runnable / "params.yaml", {"finetune_lora.rank": 2})
    dvc("print('called')")
    monkeypatch.setattr(tui_app, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    async with open_screen(runnable) as (pilot, screen):
        await pilot.press("R")
        await until(pilot, lambda: "the disk is full. Free some space" in messages(screen))


@pytest.mark.slow
async def test_a_stage_that_prints_100_mb_leaves_the_screen_alive(
    runnable: Path, dvc: Callable[[str], None]
) -> None:
    dvc(
        "line = 'x' * 99\nfor _ in range(1_000_000): print(line)\nprint('the last line', "
        "flush=True)"
    )
    async with open_screen(runnable) as (pilot, screen):
        await pilot.press("R", "L", "a")
        await until(pilot, lambda: log_lines(screen)[-1:] == ["the last line"], 60)
        assert len(screen.log_pane.lines(80)) <= 2000
        await choose(pilot, screen, "expand_vocab")
    assert (runnable / "runs/pipeline.log").stat().st_size > 100_000_000
