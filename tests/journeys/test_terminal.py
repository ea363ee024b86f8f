"""Journeys through the real program, in a real terminal, with real processes behind it."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pipeline.stages.registry import open_project
from pipeline.views.stage_tree import stage_rows
from tests.helpers.checkpoints import checkpoint
from tests.helpers.projects import LORA, ROOT, git, load, new_project
from tests.helpers.tmux import BIN, Terminal, lora_tui, needs_tmux

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
def test_from_an_empty_project_a_run_is_started_followed_resized_stopped_and_resumed(
    clone: Path,
) -> None:
    with lora_tui(clone) as terminal:
        terminal.see("○ pretrain", "not made", "S run stage", "q quit")
        lengthen(terminal, clone)
        terminal.keys("R")
        # the cursor was there; then it follows
        terminal.see("finetune_lora  ▶ ", "left", seconds=120)
        terminal.keys("2")
        first = terminal.see("Loss")
        deadline = time.monotonic() + 20
        while chart(terminal.screen()) == chart(first):
            assert time.monotonic() < deadline, "the curve does not move"
            time.sleep(0.1)
        for size in ((200, 60), (60, 16), (80, 24)):
            terminal.resize(*size)
            terminal.see("Loss")
        terminal.keys("1")
        terminal.see("finetune_lora  ▶ ", "here as dvc repro")
        stop(terminal)
        terminal.see("finetune_lora  ‖ stopped", "stopped after step")
        assert list((clone / "runs/finetune_lora").glob("checkpoint-*"))
        at = steps(clone / "runs/finetune_lora")
        terminal.keys("F12")
        terminal.see("Stopped. Run again to resume from the checkpoint.")
        terminal.keys("Escape")
        terminal.miss("Stopped. Run again")
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
    rows = stage_rows(project.readable, needs, {})
    return [row.key for row in rows if row.parent is None].index(stage)


def chart(screen: str) -> list[str]:
    return re.findall("[⠀-⣿]+", screen)


@pytest.mark.slow
def test_what_is_typed_in_one_burst_is_handled_in_order(tmp_path: Path) -> None:
    """As a slow line delivers it: keys of bindings (arrows, Enter, Tab, Ctrl+U) among letters."""
    root = new_project(tmp_path / "project")
    clear, down = "\x15", "\x1b[B"
    with lora_tui(root, (200, 60)) as terminal:
        terminal.see("○ pretrain", "not made", "q quit")
        to_the_stage = down * tree_index(root, "finetune_lora")
        terminal.type(f"{to_the_stage}\r\r{clear}12\r{down}\r{clear}99{clear}24\r{down}")
        terminal.see("12  ", "24.0  ")
        section = load(root / "params.yaml").finetune_lora
        assert (section.rank, section.alpha) == (12, 24)
        terminal.type("5")
        terminal.see("engine")
        terminal.type("\x0c0.7\t5\t0.9\t3\t40\t7\r")
        terminal.see("temperature 0.7 · top-k 5 · top-p 0.9 · seed")


@pytest.mark.slow
def test_qwen3_is_calculated_and_changed_by_keys(tmp_path: Path) -> None:
    with lora_tui(new_project(tmp_path / "project")) as terminal:
        terminal.see("q quit")
        terminal.keys("7")
        terminal.see("qwen3-8b", "8.19 B", "7,667,712", "FITS")
        terminal.keys("C-t")
        terminal.see("① qwen3-8b")


@pytest.mark.slow
def test_the_adapter_that_forgot_least_is_prompted_corrected_trained_again_and_shipped(
    tmp_path: Path,
) -> None:
    """From the first look at the results to a folder for another program, with keys alone."""
    worked = tmp_path / "project"
    subprocess.run([LORA, "new", worked, "--methods", "full,lora"], check=True)
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    subprocess.run([BIN / "dvc", "repro", "--quiet"], cwd=worked, env=environment, check=True)
    with lora_tui(worked, (120, 40)) as terminal:
        terminal.see("Stages")
        terminal.keys("3")
        terminal.see("forgot least: lora")  # found with one key
        terminal.keys("c")
        terminal.see("expanded beside lora", seconds=60)  # prompted beside its base with the second
        terminal.type("die suppe")
        terminal.keys("Enter")
        terminal.see("kocht auf dem herd", "tokens/s", seconds=60)
        terminal.keys("C-g")
        terminal.see("Correct which answer?")
        terminal.keys("j", "Enter")
        terminal.see("data/corrections.jsonl", "completion")
        terminal.keys("BSpace", "BSpace", "BSpace", "BSpace")
        terminal.type("tisch")
        terminal.see("kocht auf dem tisch", "✓")
        terminal.keys("C-s")
        terminal.see("Which stage trains on data/corrections.jsonl?")
        terminal.keys("Enter")  # LoRA's, which is offered first
        terminal.see("corrections.jsonl is in finetune_lora.data")
        assert (worked / "data/corrections.jsonl").read_text(encoding="utf-8").count("tisch") == 1
        before = (worked / "artifacts/lora_adapter/manifest.json").read_bytes()
        terminal.keys("R")
        terminal.see("Started: dvc repro")
        terminal.keys("2")
        terminal.see("Loss", "lora", seconds=60)
        terminal.see("All stages are up to date.", seconds=240)
        assert (worked / "artifacts/lora_adapter/manifest.json").read_bytes() != before
        terminal.keys("3", "x")
        terminal.see("Ship lora as")
        terminal.keys("Enter")
        terminal.see("Folder to write lora to")
        terminal.keys("Enter")
        terminal.see("lora is in shipped/lora-peft", seconds=60)
        assert (worked / "shipped/lora-peft/adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_lora_is_prompted_beside_base_again_after_a_kill(worked: Path) -> None:
    with lora_tui(worked, (120, 40)) as terminal:
        terminal.keys("5")
        terminal.see("expanded", "✓", "engine ready", seconds=60)
        terminal.keys("Down", "Space", "Down", "Down", "Down", "Down", "Space", "Enter")
        terminal.see("expanded beside lora", "F2–F9 screens")  # the keys are the field's now
        terminal.type("der wind")
        terminal.keys("Enter")
        screen = terminal.see("weht über das feld", "engine ready", seconds=60)
        assert re.search(r"weht .*\+9\d\.\d", screen), screen
        engine = child(worked)
        os.kill(engine, signal.SIGKILL)
        terminal.see("engine died")
        terminal.type("der wind")
        terminal.keys("Enter")
        terminal.see("engine ready", seconds=60)
        assert child(worked) != engine


def child(project: Path) -> int:
    """The inference process that works in `project`."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (
                b"pipeline.inference.server" in (entry / "cmdline").read_bytes()
                and (entry / "cwd").resolve() == project.resolve()
            ):
                return int(entry.name)
        except OSError:
            continue
    raise AssertionError("no inference process")


@pytest.mark.slow
def test_a_long_generation_is_interrupted_at_once(worked: Path) -> None:
    checkpoint(worked / "artifacts/endless", max_positions=16_384)
    with lora_tui(worked, (120, 40)) as terminal:
        terminal.keys("5")
        terminal.see("endless", "engine ready", seconds=60)
        terminal.keys("/")
        terminal.type("endless")
        terminal.miss("expanded")
        terminal.keys("Enter", "Space", "C-l")
        terminal.see("a whole number from 1 to 10000")
        terminal.keys("Tab", "Tab", "Tab", "Tab")
        terminal.field("limit")
        terminal.type("10000")
        terminal.keys("Enter")
        terminal.see("greedy · 10000 t")
        terminal.miss("whole number")
        terminal.keys("Enter")
        terminal.see("F2–F9 screens")  # the keys are the field's now
        terminal.type("w1 w2")
        terminal.keys("Enter")
        terminal.see("engine busy", seconds=60)
        terminal.keys("Escape")
        terminal.see("engine ready", seconds=3)  # all 10,000 take ten times as long


@pytest.mark.slow
@pytest.mark.parametrize("on_hangup", ["continue", "stop"])
def test_a_closed_terminal_leaves_the_training_or_stops_it_as_configured(
    worked: Path, on_hangup: str
) -> None:
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
