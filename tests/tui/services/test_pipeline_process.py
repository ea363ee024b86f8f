"""The pipeline runs in its own process group: it is stopped as a group, outlives its starter, and
runs only once.
"""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.errors import UserError
from pipeline.project.logs import run_state
from tests.helpers.json_files import write_json
from tests.helpers.projects import COMMAND, LORA, wait_for
from tui.services import pipeline_process
from tui.services.pipeline_process import Runner

SLEEPER = "import os, sys, time\nprint(os.getpid(), flush=True)\ntime.sleep(60)\n"
STUBBORN = f"import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n{SLEEPER}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a fake `dvc` that runs the Python code given to it in a child process."""
    (tmp_path / "bin").mkdir()
    fake = tmp_path / "bin/dvc"
    fake.write_text(
        f"#!{sys.executable}\nimport subprocess, sys\nsubprocess.Popen([sys.executable, '-c', "
        "sys.argv[1]]).wait()\n"
    )
    fake.chmod(0o755)
    monkeypatch.setattr(pipeline_process, "BIN", tmp_path / "bin")
    (tmp_path / "dvc.yaml").write_text("")
    return tmp_path


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    with Path(f"/proc/{pid}/stat").open() as file:
        return file.read().rpartition(")")[2].split()[0] == "Z"


def test_stop_reaches_every_process_of_the_group(folder: Path) -> None:
    runner = Runner(folder)
    leader = runner.start([SLEEPER]).pid
    wait_for(lambda: runner.log.read_text().strip())
    grandchild = int(runner.log.read_text())
    assert os.getpgid(grandchild) == leader != os.getpgrp()
    assert runner.stop().startswith("Stopping.")
    wait_for(lambda: runner.running() is None)
    wait_for(lambda: gone(grandchild))


def test_a_second_stop_ends_a_process_that_ignores_the_interrupt(folder: Path) -> None:
    runner = Runner(folder)
    runner.start([STUBBORN])
    wait_for(lambda: runner.log.read_text().strip())
    child = int(runner.log.read_text())
    assert not runner.is_stopping(child)
    runner.stop()
    time.sleep(0.2)
    assert not gone(child) and runner.is_stopping(child)
    runner.stop()
    wait_for(lambda: gone(child))


def test_two_workbenches_share_one_pipeline(folder: Path) -> None:
    first, second = Runner(folder), Runner(folder)
    started = first.start([SLEEPER])
    seen = second.running()
    assert seen is not None
    assert (seen.pid, seen.command) == (started.pid, started.command)
    with pytest.raises(UserError, match="already running"):
        second.start([SLEEPER])
    second.stop()
    wait_for(lambda: first.running() is None)
    assert second.running() is None
    second.start(["print('again')"])
    wait_for(lambda: "again" in second.log.read_text())


def test_it_outlives_its_starter_and_is_detected(folder: Path) -> None:
    code = (
        "import sys, os; from pathlib import Path; from tui.services import pipeline_process; "
        f"pipeline_process.BIN = Path({str(folder / 'bin')!r}); "
        f"pipeline_process.Runner(Path({str(folder)!r})).start([{SLEEPER!r}]); "
        "os.kill(os.getpid(), 9)"
    )
    starter = subprocess.run([sys.executable, "-c", code], check=False)
    assert starter.returncode == -signal.SIGKILL
    runner = Runner(folder)
    assert runner.running() is not None
    wait_for(lambda: runner.log.read_text().strip())
    runner.stop()
    wait_for(lambda: runner.running() is None)


def test_nothing_to_stop_and_nothing_to_run_are_errors(tmp_path: Path) -> None:
    runner = Runner(tmp_path)
    with pytest.raises(UserError, match="Nothing is running"):
        runner.stop()
    with pytest.raises(UserError, match=r"no dvc\.yaml"):
        runner.start(["repro"])
    assert not (tmp_path / "runs").exists()


def starting(project: Path) -> None:
    (project / "dvc.yaml").write_text("")
    Runner(project).start(["repro"])


@pytest.mark.slow
def test_a_stage_that_was_started_elsewhere_is_stopped_with_its_checkpoint_kept(
    project: Path,
) -> None:
    command = [LORA, *COMMAND["finetune_full"], "--force", "--set", "finetune_full.epochs=20000"]
    stage = subprocess.Popen(
        command, cwd=project, stderr=subprocess.DEVNULL, start_new_session=True
    )
    folder = project / "runs/finetune_full"
    wait_for(lambda: (run := run_state.read(folder)) and run.pid == stage.pid and run.done > 1)
    with pytest.raises(UserError, match="started elsewhere"):
        starting(project)
    assert "with a checkpoint" in Runner(project).stop()
    assert stage.wait(20) == 130
    assert list(folder.glob("checkpoint-*"))
    shutil.rmtree(folder)


def test_what_another_machine_runs_gets_no_signal_here(folder: Path) -> None:
    """Its process ids are those of other programs of this machine."""
    bystander = subprocess.Popen(["sleep", "60"], start_new_session=True)
    run = folder / "runs/pretrain"
    run.mkdir(parents=True)
    other = {"pid": bystander.pid, "started": time.time(), "host": "node7"}
    write_json(run / "run.json", {"state": "running", **other})
    with (run / "lock").open("w") as stage, (folder / "runs/pipeline.lock").open("w") as lock:
        stage.write(f"node7 {bystander.pid}")
        json.dump({**other, "command": "dvc repro"}, lock)
        for file in (stage, lock):
            file.flush()
            fcntl.flock(file, fcntl.LOCK_EX)
        runner = Runner(folder)
        running = runner.running()
        assert running and str(running.process) == f"process {bystander.pid} on node7"
        assert runner.groups() == []
        with pytest.raises(UserError, match="Nothing is running on this machine"):
            runner.stop()
        (folder / "runs/pipeline.lock").unlink()
        with pytest.raises(UserError, match="started elsewhere"):
            runner.start(["repro"])
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


def test_a_pipeline_is_seen_on_a_file_system_without_flock(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", missing)
    runner, other = Runner(folder), Runner(folder)
    runner.start([SLEEPER])
    running = other.running()
    assert running is not None and running.command == f"dvc {SLEEPER}"
    (folder / "runs/pipeline.lock").write_text(
        json.dumps({**vars(running), "started": running.started - 60}), encoding="utf-8"
    )
    assert other.running() is None, "a later process with the id of an earlier one"
    (folder / "runs/pipeline.lock").write_text(json.dumps(vars(running)), encoding="utf-8")
    runner.stop()
    wait_for(lambda: runner.running() is None)
    assert other.running() is None
