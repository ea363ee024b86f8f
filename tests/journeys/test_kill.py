"""SIGKILL, SIGINT and SIGTERM while training: nothing is lost, and the final bytes are those of an
undisturbed run.
"""

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import Lora
from tests.helpers.json_files import read_json
from tests.helpers.process import Forked, forked
from tests.helpers.projects import BRIEF, COMMAND, LORA, folder_bytes, make_one, note_texts

TRAINING = {
    "pretrain": ("base", "pretrain.epochs=10"),
    "train_from_scratch": ("from_scratch", "train_from_scratch.epochs=8"),
    "finetune_full": ("full_finetuned", "finetune_full.epochs=25"),
    "finetune_freeze": ("layer_frozen", "finetune_freeze.epochs=25"),
    "finetune_lora": ("lora_adapter", "finetune_lora.epochs=50"),
    "finetune_prefix": ("prefix", "finetune_prefix.epochs=25"),
    "finetune_prompt": ("prompt", "finetune_prompt.epochs=25"),
}
EVERY = 20  # steps between checkpoints


def command(stage: str) -> list[str]:
    return [
        LORA,
        *COMMAND[stage],
        "--set",
        TRAINING[stage][1],
        "--set",
        f"{stage}.save_steps=30",
        "--force",
        "--checkpoint-every",
        str(EVERY),
    ]


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def passed(project: Path, stage: str, step: int) -> Callable[[], bool]:
    """Whether the stage's log has passed `step` new lines from now on."""
    log = project / "runs" / stage / "loss.csv"
    before = log.stat().st_mtime_ns if log.exists() else 0
    return lambda: log.exists() and log.stat().st_mtime_ns != before and lines(log) > step


def killed_at(project: Path, stage: str, step: int) -> tuple[int, str]:
    """Start the stage and kill it once its log has passed `step` new lines: exit code and
    stderr.
    """
    there = passed(project, stage, step)
    running = Forked(command(stage), project)
    while running.process.is_alive() and not there():
        time.sleep(0.0005)
    with suppress(ProcessLookupError):  # it ended just now
        running.process.kill()
    return running.end()


def finish(project: Path, stage: str) -> str:
    """Run the stage to its end: its stderr."""
    code, errors = Forked(command(stage), project).end()
    assert code == 0, errors
    return errors


@pytest.mark.parametrize(
    ("stage", "times"),
    [
        *((stage, 2) for stage in TRAINING),
        pytest.param("finetune_lora", 20, marks=pytest.mark.slow),
    ],
)
@pytest.mark.sampled(3)
@pytest.mark.slow
def test_killed_at_random_steps_it_ends_with_the_same_bytes(
    project: Path, stage: str, times: int
) -> None:
    """One engine trains them all: a stage shows in a few kills what it adds to it."""
    folder = project / "artifacts" / TRAINING[stage][0]
    finish(project, stage)
    expected, total = folder_bytes(folder), lines(folder / "loss.csv") - 1
    shutil.rmtree(project / "runs" / stage)
    chance = random.Random(stage)
    kills = resumed = 0
    while kills < times:
        step = chance.randrange(1 if kills else 2 * EVERY, total)  # the first leaves a checkpoint
        code, errors = killed_at(project, stage, step)
        if code == -signal.SIGKILL:
            kills += 1
            resumed += "resumed after step" in errors
        else:  # it was past that step and finished first
            assert code == 0, errors
            assert folder_bytes(folder) == expected
            shutil.rmtree(project / "runs" / stage)
        if chance.random() < 0.3:  # let it finish from here
            errors = finish(project, stage)
            resumed += "resumed after step" in errors
            assert folder_bytes(folder) == expected, errors
    errors = finish(project, stage)
    resumed += "resumed after step" in errors
    assert folder_bytes(folder) == expected, errors
    assert resumed > 0
    assert not list((project / "artifacts").glob(".*")), "no temporary folder is left"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.sampled(2)
@pytest.mark.slow
def test_a_signal_ends_at_a_step_with_a_checkpoint_and_the_next_run_goes_on(
    project: Path, number: signal.Signals, code: int
) -> None:
    finish(project, "finetune_lora")
    expected = folder_bytes(project / "artifacts/lora_adapter")
    shutil.rmtree(project / "runs/finetune_lora")
    there = passed(project, "finetune_lora", 30)
    stage = subprocess.Popen(
        forked("cli.main", *command("finetune_lora")[1:]),
        cwd=project,
        stderr=subprocess.PIPE,
        text=True,
    )
    while stage.poll() is None and not there():
        time.sleep(0.0005)
    stage.send_signal(number)
    _, errors = stage.communicate()
    assert stage.returncode == code, errors
    assert "stopped after step" in errors
    assert "Run the same command to resume." in errors
    assert "Traceback" not in errors
    step = int(errors.split("after step ")[1].split()[0])
    (checkpoint,) = (project / "runs/finetune_lora").glob("checkpoint-*")
    assert checkpoint.name == f"checkpoint-{step:09d}"
    assert f"resumed after step {step}" in finish(project, "finetune_lora")
    assert folder_bytes(project / "artifacts/lora_adapter") == expected


def stop_early(project: Path) -> Path:
    """A run of finetune_lora that was killed after a checkpoint; returns the checkpoint."""
    shutil.rmtree(project / "runs/finetune_lora")
    killed_at(project, "finetune_lora", 60)
    *older, checkpoint = sorted((project / "runs/finetune_lora").glob("checkpoint-*"))
    for folder in older:  # killed after the new one was complete, before the old one was removed
        shutil.rmtree(folder)
    return checkpoint


@pytest.mark.slow
def test_a_run_never_goes_on_from_a_log_that_another_has_overwritten(project: Path) -> None:
    """Stopped with a checkpoint, overwritten by a run of other params that dies early, then run
    again.
    """
    finish(project, "finetune_lora")
    expected = folder_bytes(project / "artifacts/lora_adapter")
    stop_early(project)
    other = [*command("finetune_lora")[:-1], "1000", "--set", "finetune_lora.learning_rate=0.01"]
    log = project / "runs/finetune_lora/loss.csv"
    running = Forked(other, project)
    while "0.01," not in log.read_text() or lines(log) < 90:
        time.sleep(0.0005)
    running.process.kill()
    running.end()
    finish(project, "finetune_lora")
    assert folder_bytes(project / "artifacts/lora_adapter") == expected


@pytest.mark.slow
def test_killed_at_any_time_from_its_start_to_its_last_rename_it_ends_with_the_same_bytes(
    project: Path,
) -> None:
    folder = project / "artifacts/lora_adapter"
    start = time.perf_counter()
    subprocess.run(command("finetune_lora"), cwd=project, capture_output=True, check=True)
    whole, expected = time.perf_counter() - start, folder_bytes(folder)
    for turn in range(12):
        process = subprocess.Popen(command("finetune_lora"), cwd=project, stdout=subprocess.DEVNULL)
        time.sleep(whole * (turn + 1) / 12)
        process.kill()
        process.wait()
        assert not folder.exists() or folder_bytes(folder) == expected
    subprocess.run(command("finetune_lora"), cwd=project, capture_output=True, check=True)
    assert folder_bytes(folder) == expected
    assert not [
        path for path in (project / "runs/finetune_lora").iterdir() if "checkpoint" in path.name
    ]


@pytest.mark.slow
def test_killed_where_it_syncs_a_file_from_its_first_step_to_its_artifact_it_ends_with_the_same_bytes(
    project: Path,
) -> None:
    """The log, a checkpoint, the artifact and its copy in the cache are all synced as they are
    written.
    """
    folder = project / "artifacts/lora_adapter"
    finish(project, "finetune_lora")
    expected, stopped = folder_bytes(folder), 0
    for call in range(1, 100, 9):
        running = Forked(command("finetune_lora"), project, dies=("os.fsync", call))
        code, errors = running.end()
        assert not folder.exists() or folder_bytes(folder) == expected
        if code == 0:  # it went on from its checkpoint, so what was left had fewer calls
            break
        assert code == -signal.SIGKILL, errors
        stopped += 1
    assert stopped > 2
    finish(project, "finetune_lora")
    assert folder_bytes(folder) == expected
    assert not [
        path for path in (project / "runs/finetune_lora").iterdir() if "checkpoint" in path.name
    ]


def test_a_checkpoint_of_other_params_is_refused_and_said_so(project: Path) -> None:
    stop_early(project)
    _, events = make_one(project, "finetune_lora", [*BRIEF, "finetune_lora.seed=5"])
    notes = note_texts(events)
    assert "replaced the earlier one: seed 0 → 5" in notes[-1]
    assert notes[0] == (
        "finetune_lora: the checkpoint is not used and training starts over: "
        "it was made with other params, data or code"
    )


@pytest.mark.slow
def test_a_cache_hit_for_other_params_leaves_a_stopped_run_its_checkpoint(project: Path) -> None:
    checkpoint = stop_early(project)
    _, events = make_one(project, "finetune_lora", BRIEF)
    assert "taken from the cache" in str(events)
    assert f"resumed after step {int(checkpoint.name.split('-')[1])}" in finish(
        project, "finetune_lora"
    )


@pytest.mark.slow
def test_a_damaged_checkpoint_is_refused_and_said_so(project: Path) -> None:
    checkpoint = stop_early(project)
    path = checkpoint / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-8] + b"damaged!")
    errors = finish(project, "finetune_lora")
    assert "training starts over" in errors
    assert "state.safetensors was changed" in errors


@pytest.mark.slow
def test_a_checkpoint_whose_log_is_gone_is_not_used(project: Path) -> None:
    stop_early(project)
    (project / "runs/finetune_lora/loss.csv").unlink()
    assert "training starts over" in finish(project, "finetune_lora")
    assert lines(project / "artifacts/lora_adapter/loss.csv") == 301


def test_a_stage_killed_while_it_replaces_its_artifact_leaves_the_old_one(
    project: Path, cli: Lora
) -> None:
    target = project / "artifacts/lora_merged"
    before = folder_bytes(target)
    gone = subprocess.Popen(["true"])
    gone.wait()
    target.rename(target.parent / f".lora_merged.{gone.pid}.old")
    (target.parent / f".lora_merged.{gone.pid}.tmp").mkdir()
    (target.parent / "lora_adapter/adapter_model.safetensors").unlink()  # so that merging fails
    assert cli("merge", "--force", cwd=project)[0] == 1
    assert folder_bytes(target) == before
    assert not list(target.parent.glob(".*"))


@pytest.mark.slow
def test_two_processes_of_one_stage_take_turns(project: Path) -> None:
    both = [LORA, "finetune", "full", "--set", "finetune_full.epochs=150"]
    ends = [process.end() for process in [Forked(both, project) for _ in range(2)]]
    assert [code for code, _ in ends] == [0, 0]
    assert sum("waiting for process" in errors for _, errors in ends) == 1
    assert sum("taken from the cache" in errors for _, errors in ends) == 1
    assert read_json(project / "artifacts/full_finetuned/manifest.json")["params"]["epochs"] == 150
