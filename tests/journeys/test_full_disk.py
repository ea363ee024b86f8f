"""A full disk: an error of the system that names the file, never the fault of a base, and a reason
that is kept.
"""

import errno
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from pipeline.files import base_model
from pipeline.models.import_base import import_base
from pipeline.models.save import save_tensors
from pipeline.project.logs import run_state
from pipeline.stages.registry import open_project
from pipeline.views.stages import Status
from tests.helpers.bases import toy_checkpoint
from tests.helpers.projects import BRIEF, files_up_to, lora, new_project
from tui.services import pipeline_process
from tui.services.pipeline_process import Runner

FULL_ERROR = "No space left on device. Free some space."


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one mebibyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk takes root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Leave no byte; returns the file that takes them."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError as error:
            assert error.errno == errno.ENOSPC
    return filler


def test_tensors_that_do_not_fit_are_an_os_error_about_their_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with files_up_to(4096), pytest.raises(OSError) as raised:
        save_tensors(path, {"weight": torch.zeros(64, 64)})
    assert (raised.value.errno, raised.value.filename) == (errno.EFBIG, str(path))


@pytest.mark.parametrize("size", [100, 2_000, 20_000])  # config.json, tokenizer.json, the weights
def test_an_import_that_does_not_fit_blames_no_base(tmp_path: Path, size: int) -> None:
    toy_checkpoint(tmp_path / "llama")
    source = base_model.resolve("llama", tmp_path)
    (tmp_path / "out").mkdir()
    with files_up_to(size), pytest.raises(OSError) as raised:
        import_base(source, tmp_path / "out")
    assert raised.value.errno == errno.EFBIG


def test_a_run_that_dies_of_a_full_disk_says_so_in_its_journal(disk: Path) -> None:
    with pytest.raises(OSError), run_state.writing(disk) as writer:
        writer.note("a note")
        fill(disk)
        (disk / "log").write_bytes(bytes(4096))
    run = run_state.read(disk)
    assert run is not None
    assert (run.state, run.message) == ("failed", FULL_ERROR)
    assert [path.name for path in disk.glob("*.tmp")] == []


@pytest.mark.slow
def test_a_stage_that_dies_of_a_full_disk_is_failed_and_says_why(disk: Path) -> None:
    root = new_project(disk / "project")
    filler = disk / "filler"
    # room for the logs, but not for the model
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - 60_000))
    done = lora("pretrain", *(word for one in BRIEF for word in ("--set", one)), cwd=root)
    assert done.returncode == 1
    assert "error: No space left on device" in done.stderr
    assert "Free some space. Existing results are unchanged." in done.stderr
    state = Status().of(open_project(root / "params.yaml"))["pretrain"]
    assert state.state == "failed"
    assert re.fullmatch(r"No space left on device(: \S+)?\. Free some space\.", state.reasons[0])


def test_a_pipeline_whose_lock_cannot_be_written_is_ended(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = disk.parent / "bin/dvc"
    command.parent.mkdir()
    command.write_text(f"#!{sys.executable}\nimport time\ntime.sleep(60)\n")
    command.chmod(0o755)
    monkeypatch.setattr(pipeline_process, "BIN", command.parent)
    (disk / "dvc.yaml").write_text("")
    (disk / "runs").mkdir()
    filler, runner = fill(disk), Runner(disk)
    started: list[subprocess.Popen[bytes]] = []
    spawn = runner._spawn

    def spawned(command: Sequence[str], lock: int) -> subprocess.Popen[bytes]:
        started.append(spawn(command, lock))
        return started[0]

    monkeypatch.setattr(runner, "_spawn", spawned)
    with pytest.raises(OSError) as raised:
        runner.start(["repro"])
    assert raised.value.filename == str(disk / "runs/pipeline.lock")
    assert started[0].poll() is not None
    assert not runner.groups()
    filler.unlink()
    other = Runner(disk)  # of another workbench, which no lock stops
    other.start(["repro"])
    other.stop()
