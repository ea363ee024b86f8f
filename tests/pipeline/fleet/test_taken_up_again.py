"""Runs that a second command finds: other jobs, endings, clusters and terminals."""

import json
import os
import signal
import subprocess
from collections.abc import Collection
from pathlib import Path

import pytest

from pipeline.errors import NO_MEMORY, UserError
from pipeline.files.locks import Lock, process_state
from pipeline.fleet.engines import Queued, local
from pipeline.fleet.engines.slurm import Slurm
from pipeline.fleet.run import FleetRun, cancel, open_run
from pipeline.fleet.settings import Cluster
from pipeline.fleet.states import state_by_files
from pipeline.fleet.sweeps import FleetSweep
from pipeline.fleet.unit import STOP, attempts, end_unit
from pipeline.stages.registry import open_project
from tests.conftest import Lora
from tests.helpers.fleets import new_fleet
from tests.helpers.projects import (
    BRIEF,
    LORA,
    lora,
    make_base,
    new_project,
    wait_for,
)

POOL = "pool: {engine: slurm}\n"


def program(folder: Path, name: str, script: str) -> None:
    """A program that stands in for one of Slurm's."""
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


class Queue:
    """An engine that starts what it is given."""

    has_queue = True

    def __init__(self) -> None:
        self.submitted = list[list[int]]()

    def submit(self, _run: FleetRun, numbers: Collection[int]) -> str:
        self.submitted.append(sorted(numbers))
        return "42"

    def states(self, _run: FleetRun, _numbers: Collection[int]) -> dict[int, Queued]:
        return {}


def test_a_run_without_jobs_cancels_nobody_else_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """scancel without names takes all jobs of the user."""
    (tmp_path / "fleet.yaml").write_text(POOL)
    program(tmp_path, "scancel", f'echo "$@" >> {tmp_path}/canceled')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    run = new_fleet(tmp_path, ["rank-1"], cluster="pool")
    assert cancel(run) == [1]
    assert not (tmp_path / "canceled").exists()
    program(tmp_path, "squeue", "echo '42_1|RUNNING|node1|None'")
    run.jobs = [("42", [1])]
    assert cancel(run) == [1]
    assert all("42_1" in line for line in (tmp_path / "canceled").read_text().splitlines())


def test_what_was_stopped_on_one_cluster_is_not_stopped_on_the_next(tmp_path: Path) -> None:
    run = new_fleet(tmp_path, ["rank-1"])
    assert cancel(run) == [1] and [unit.state for unit in run.states()] == ["stopped"]
    run.__dict__["engine"] = queue = Queue()
    list(run.start([]))
    assert queue.submitted == [[1]] and not (run.unit_folder(1) / STOP).exists()


@pytest.mark.parametrize("code", [1, NO_MEMORY])
def test_a_unit_that_failed_for_good_is_tried_by_who_asks_again(tmp_path: Path, code: int) -> None:
    run = new_fleet(tmp_path, ["rank-1", "rank-2"])
    rows = [{"node": "node1", "pid": 1, "started": 1.0, "done": 0}] * 3
    folder = run.unit_folder(1)
    (folder / "attempts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    end_unit(folder, code, "no progress in 3 attempts")
    end_unit(run.unit_folder(2), 0)
    run.__dict__["engine"] = queue = Queue()
    list(run.start([]))
    assert queue.submitted == [[1]]
    # the unit runs, though three attempts before it made no progress
    assert lora("fleet", "unit", str(folder), cwd=tmp_path).returncode == 0
    assert len(attempts(folder)) == 4


def test_jobs_of_another_cluster_are_refused_and_not_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = open_project(new_project(tmp_path / "mini") / "params.yaml", [])
    (project.root / "fleet.yaml").write_text(POOL)
    program(tmp_path, "squeue", "echo '42_1|RUNNING|node1|None'")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    run = new_fleet(project.root, ["rank-1"], cluster="pool")
    run.jobs = [("42", [1])]
    run.save()
    with pytest.raises(UserError, match=f"{run.name} goes on on pool.*fleet cancel"):
        open_run(project, run.stage, run.name, "local")
    program(tmp_path, "squeue", "echo '42_1|CANCELLED|node1|None'")
    assert open_run(project, run.stage, run.name, "local").jobs == []


def test_a_second_wave_of_units_has_all_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "_places", lambda most: [{"OMP_NUM_THREADS": "1"}] * min(2, most))
    run = new_fleet(tmp_path, ["base", "rank-1", "rank-2"])
    engine = local.Local("local", Cluster())
    engine.submit(run, [1])
    wait_for(lambda: (run.unit_folder(1) / "exit.json").exists())
    engine.submit(run, [2, 3])
    assert sorted(engine._running) == [2, 3]
    cancel(run)
    engine.cancel(run, [2, 3])


def test_a_process_with_the_number_of_an_attempt_is_not_the_attempt(tmp_path: Path) -> None:
    run = new_fleet(tmp_path, ["rank-1"])
    folder = run.unit_folder(1)
    for ticks, state in [(process_state(os.getpid())[1], "running"), ("1", "lost")]:
        row = {"node": os.uname().nodename, "pid": os.getpid(), "started": 1.0, "done": 0}
        (folder / "attempts.jsonl").write_text(json.dumps({**row, "ticks": ticks}))
        assert state_by_files(1, folder).state == state
        assert [unit.state for unit in run.states()] == [state]


@pytest.mark.parametrize(
    "row", [b'{"node": "n", "pid": 1e999, "started": 1, "done": 0}', b'{"node": "\xff"}', b"\x1b["]
)
def test_rows_of_nonsense_are_passed_over(cli: Lora, tmp_path: Path, row: bytes) -> None:
    run = new_fleet(tmp_path, ["rank-1"])
    (run.unit_folder(1) / "attempts.jsonl").write_bytes(row + b"\n")
    (run.unit_folder(1) / "exit.json").write_bytes(row)
    code, out, _ = cli("fleet", cwd=tmp_path)
    assert code == 0 and "waiting" in out


def test_a_run_whose_cluster_is_gone_hides_no_other(cli: Lora, tmp_path: Path) -> None:
    new_fleet(tmp_path, ["rank-1"], cluster="gone")
    new_fleet(tmp_path, ["finetune_lora"], ["finetune_lora"])
    code, out, _ = cli("fleet", cwd=tmp_path)
    assert code == 0 and "finetune_lora on local" in out
    assert "✗ --on gone: " in out and "has no such cluster" in out


@pytest.mark.parametrize("command", ["retry", "cancel", "logs"])
def test_a_number_that_no_unit_has_is_refused(cli: Lora, tmp_path: Path, command: str) -> None:
    run = new_fleet(tmp_path, ["rank-1"])
    code, out, errors = cli("fleet", command, run.name, "2", cwd=tmp_path)
    assert (code, out) == (1, "") and "has no unit 2. Its units are 1 to 1" in errors


def test_collect_types_the_command_without_its_detach(tmp_path: Path) -> None:
    run = new_fleet(tmp_path, ["rank-1"])
    run.command, run.place = ["finetune", "sweep", "--detach"], tmp_path
    run.save()
    told = lora("fleet", "collect", run.name, cwd=tmp_path)
    assert told.returncode == 1 and "--detach" not in told.stderr
    assert "params.yaml" in told.stderr


@pytest.mark.parametrize("command", [["fleet", "collect", "2d67857b"], ["fleet"], ["cache"], []])
def test_a_run_that_came_with_a_project_types_no_other_command(
    cli: Lora, tmp_path: Path, command: list[str]
) -> None:
    """`fleet collect` of itself would never end."""
    run = new_fleet(tmp_path, ["rank-1"])
    run.command = command
    run.save()
    code, _, errors = cli("fleet", "collect", run.name, cwd=tmp_path)
    assert code == 1 and "is not one run of a fleet here" in errors


def test_jobs_that_ended_before_a_unit_began_are_not_held_against_who_asks_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_fleet(tmp_path, ["rank-1"])
    run.__dict__["engine"] = Queue()
    run.jobs = [(str(number), [1]) for number in range(3)]
    monkeypatch.setenv("LORA_FOLLOWS", run.name)  # the run's own job in the queue asks nobody
    list(run.start([]))
    with pytest.raises(UserError, match="end before it begins"):
        run.refuse_vain([1])
    monkeypatch.delenv("LORA_FOLLOWS")
    list(run.start([]))
    run.refuse_vain([1])


def test_gpus_are_of_each_machine(tmp_path: Path) -> None:
    run = new_fleet(tmp_path, ["rank-1"], cluster="pool")
    options = Slurm("pool", Cluster(engine="slurm", gpus=8))._options(run)
    assert "--gpus-per-node=8" in options


def test_a_second_command_waits_for_the_first_one_s_units(tmp_path: Path) -> None:
    root = make_base(new_project(tmp_path / "mini"), BRIEF)
    overrides = ["finetune_sweep.grid={rank: [1, 2]}", "finetune_lora.epochs=2"]
    command = [LORA, "finetune", "sweep", "--on", "local", *(f"--set={key}" for key in overrides)]

    def typed() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, cwd=root, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )

    run = FleetSweep(open_project(root / "params.yaml", overrides), overrides, "local").run
    run.folder.mkdir(parents=True)
    with Lock(run.folder / "lock") as lock:
        lock.acquire()
        second, interrupted = typed(), typed()
        try:
            for process in (second, interrupted):
                assert process.stderr is not None
                line = next(line for line in process.stderr if "runs its units" in line)
                assert f"process {os.getpid()} runs its units; this command waits" in line
            interrupted.send_signal(signal.SIGINT)
            assert f"the units of {run.name} go on" in interrupted.communicate(timeout=60)[1]
            assert not attempts(run.unit_folder(1)) and second.poll() is None
        except BaseException:
            second.kill()
            interrupted.kill()
            raise
    _, errors = second.communicate(timeout=120)
    assert second.returncode == 0, errors
    assert len(attempts(run.unit_folder(1))) == 1
