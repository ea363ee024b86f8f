"""Journeys through the real program, in a real terminal, with real processes behind it."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pipeline.workbench import open_project
from tests.helpers.checkpoints import checkpoint
from tests.helpers.projects import LORA, git, load, new_project
from tests.helpers.tmux import Terminal, lora_tui, needs_tmux
from tui.screens.pipeline.tree import tree_rows

pytestmark = needs_tmux


@pytest.fixture
def clone(origin: Path, tmp_path: Path) -> Path:
    """A fresh clone: nothing is made yet."""
    git(tmp_path, "clone", "-q", str(origin), "clone")
    return tmp_path / "clone"


@pytest.fixture
def worked(finished: Path, tmp_path: Path) -> Path:
    """A finished project to write to."""
    return Path(shutil.copytree(finished, tmp_path / "project"))


def steps(folder: Path) -> int:
    path = folder / "loss.csv"
    return path.read_text(encoding="utf-8").count("\n") if path.exists() else 0


@pytest.mark.slow
def test_from_an_empty_project_a_run_is_started_followed_resized_stopped_and_resumed(clone: Path) -> None:
    with lora_tui(clone) as terminal:
        terminal.see("○ pretrain", "not made", "S run stage", "q quit")
        lengthen(terminal, clone)
        terminal.keys("R")
        terminal.see("finetune_lora  ▶ ", "left", seconds=120)  # the cursor was there; then it follows
        terminal.keys("2")
        first = terminal.see("loss")
        deadline = time.monotonic() + 20
        while chart(terminal.screen()) == chart(first):
            assert time.monotonic() < deadline, "the curve does not move"
            time.sleep(0.1)
        for size in ((200, 60), (60, 16), (80, 24)):
            terminal.resize(*size)
            terminal.see("loss")
        terminal.keys("1")
        terminal.see("finetune_lora  ▶ ", "here as dvc repro")
        stop(terminal)
        terminal.see("finetune_lora  ‖ stopped", "stopped after step")
        assert list((clone / "runs/finetune_lora").glob("checkpoint-*"))
        at = steps(clone / "runs/finetune_lora")
        terminal.see("Stopped.")
        terminal.keys("S")
        terminal.see("finetune_lora  ▶ ", "left", "resumed after step", seconds=60)
        terminal.keys("L")
        terminal.see("Log of finetune_lora", "following", "loss")
        assert steps(clone / "runs/finetune_lora") >= at - 1
        stop(terminal)  # the log has the keys, and leaves it these
        terminal.see("‖ stopped")


def stop(terminal: Terminal) -> None:
    """Stop what runs, and say yes."""
    terminal.keys("X")
    terminal.see("Stop finetune_lora?")
    terminal.keys("y")


def lengthen(terminal: Terminal, clone: Path) -> None:
    """Find the number of epochs among finetune_lora's params, and type another."""
    terminal.keys(*["Down"] * tree_index(clone, "finetune_lora"))
    terminal.see("finetune_lora  ○ not made yet", "target_modules")
    terminal.keys("Enter")
    terminal.type("/times that every")  # what it means
    terminal.see("training (1)")
    terminal.keys("Enter", "Down", "Enter")
    terminal.type("x")
    terminal.see("✗ finetune_lora.epochs must be")
    terminal.keys("BSpace")
    terminal.type("30000")
    terminal.see("Enter writes finetune_lora.epochs")
    terminal.keys("Enter")
    terminal.miss("block training")  # the section has its own now
    assert load(clone / "params.yaml").finetune_lora.epochs == 30_000


def tree_index(root: Path, stage: str) -> int:
    """How many rows of the tree are above a stage's."""
    project = open_project(root / "params.yaml")
    needs = {name: project.home(name).needs(each) for name, each in project.readable.items()}
    return [row.key for row in tree_rows(project.readable, needs, unfolded=False)].index(stage)


def chart(screen: str) -> list[str]:
    return re.findall("[⠀-⣿]+", screen)


@pytest.mark.slow
def test_what_is_typed_in_one_burst_is_handled_in_order(tmp_path: Path) -> None:
    """As a slow line delivers it: keys of bindings (arrows, Enter, Tab, Ctrl+U) among letters."""
    root = new_project(tmp_path / "project")
    clear, down = "\x15", "\x1b[B"
    with lora_tui(root, (120, 40)) as terminal:
        terminal.see("○ pretrain", "not made", "q quit")
        to_the_stage = down * tree_index(root, "finetune_lora")
        terminal.type(f"{to_the_stage}\r\r{clear}12\r{down}\r{clear}99{clear}24\r{down}")
        terminal.see("12  ", "24.0  ")
        section = load(root / "params.yaml").finetune_lora
        assert (section.rank, section.alpha) == (12, 24)
        terminal.type("4")
        terminal.see("engine not started")
        terminal.type("t0.7\t5\t0.9\t3\t40\t7\r")
        terminal.see("temperature 0.7 · top-k 5 · top-p 0.9 · seed 3 · 40 tokens · 7 candidates")


def test_qwen3_is_calculated_and_changed_by_keys(tmp_path: Path) -> None:
    with lora_tui(new_project(tmp_path / "project")) as terminal:
        terminal.see("q Quit")
        terminal.keys("3")
        terminal.see("qwen3-8b", "8,190,735,360", "7,667,712")
        terminal.keys("p")
        terminal.see("pinned")


@pytest.mark.slow
def test_lora_is_prompted_beside_base_again_after_a_kill_and_swapped_for_another_adapter(worked: Path) -> None:
    shutil.copytree(worked / "artifacts/lora_adapter", worked / "artifacts/second")
    with lora_tui(worked, (120, 40)) as terminal:
        terminal.keys("4")
        terminal.see("expanded", "verified")
        terminal.keys("u", "p")
        terminal.miss("Select")  # the keys are the field's now
        terminal.type("der wind")
        terminal.keys("Enter")
        screen = terminal.see("weht", "lora", "merged", "engine ready", seconds=60)
        assert re.search(r"weht .*\+9\d\.\d", screen), screen
        engine = child(worked)
        os.kill(engine, signal.SIGKILL)
        terminal.see("engine died")
        ask_again(terminal)
        terminal.see("engine ready", seconds=60)
        fresh = child(worked)
        assert fresh != engine
        terminal.keys("u")
        terminal.miss("● base")  # none is selected
        row = terminal.drawn("pretrain")
        terminal.keys("Escape")
        terminal.redrawn("pretrain", row)  # its cursor has the table's focus
        terminal.keys(*["Down"] * 8, "Space")
        terminal.see("● second")
        ask_again(terminal)
        screen = terminal.see("next     second", "98.1", "second  der wind weht", "engine ready")
        assert "freeze" not in screen.split("candidates")[1].split("earlier")[0]
        assert child(worked) == fresh


def ask_again(terminal: Terminal) -> None:
    """Send the prompt that was sent before."""
    terminal.keys("p")
    terminal.miss("Select")  # the keys are the field's now
    terminal.keys("Up")
    terminal.field("der wind")
    terminal.keys("Enter")


def child(project: Path) -> int:
    """The inference process that works in `project`."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            if "pipeline.inference.server" in command and (entry / "cwd").resolve() == project.resolve():
                return int(entry.name)
        except OSError:
            continue
    raise AssertionError("no inference process")


@pytest.mark.slow
def test_a_long_generation_is_interrupted_at_once(worked: Path) -> None:
    checkpoint(worked / "artifacts/endless", max_positions=16_384)
    with lora_tui(worked, (120, 40)) as terminal:
        terminal.keys("4")
        terminal.see("endless")
        terminal.keys("/")
        terminal.see("only models with")
        terminal.type("endless")
        terminal.miss("expanded")
        terminal.keys("Enter")
        terminal.see("Select")  # the keys are the table's again
        terminal.keys("Space")
        terminal.see("● endless")
        terminal.keys("t")
        terminal.see("limit")
        terminal.keys("Tab", "Tab", "Tab", "Tab")
        terminal.field("limit")
        terminal.type("10000")
        terminal.keys("Enter")
        terminal.see("10000 tokens")
        terminal.keys("p")
        terminal.miss("Select")  # the keys are the field's now
        terminal.type("w1 w2")
        terminal.keys("Enter")
        terminal.see("engine busy", seconds=60)
        terminal.keys("Escape")
        terminal.see("engine ready", seconds=3)  # all 10,000 take ten times as long


@pytest.mark.slow
@pytest.mark.parametrize("on_hangup", ["continue", "stop"])
def test_a_closed_terminal_leaves_the_training_or_stops_it_as_configured(worked: Path, on_hangup: str) -> None:
    config = worked / ".home/lora-workbench/tui.yaml"
    config.parent.mkdir(parents=True)
    config.write_text(f"on_hangup: {on_hangup}", encoding="utf-8")
    command = [LORA, "finetune", "lora", "--force", "--set", "finetune_lora.epochs=100000"]
    stage = subprocess.Popen(command, cwd=worked, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        with lora_tui(worked) as terminal:
            terminal.see("finetune_lora  ▶ ", "left")
        if on_hangup == "stop":
            assert stage.wait(20) == 130
            assert list((worked / "runs/finetune_lora").glob("checkpoint-*"))
        else:
            at = steps(worked / "runs/finetune_lora")
            end = time.monotonic() + 20
            while steps(worked / "runs/finetune_lora") < at + 100:
                assert stage.poll() is None
                assert time.monotonic() < end, "the training does not go on"
                time.sleep(0.1)
    finally:
        stage.kill()
        stage.wait()
