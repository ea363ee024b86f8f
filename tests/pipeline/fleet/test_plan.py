"""How work is divided, and what happens to a unit that runs out of memory."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import NO_MEMORY
from pipeline.fleet.engines import Place
from pipeline.fleet.plan import Cost, parts_of
from pipeline.fleet.run import find_run
from pipeline.fleet.unit import attempts, end_unit, ended, oom_kills, read_unit
from tests.helpers.fleets import new_fleet
from tests.helpers.projects import BRIEF, lora, make_base, new_project, swept_weights

SWEEP = ["finetune", "sweep", "--set", "finetune_lora.epochs=2", "--grid", "rank=1,2,4"]
ROOM = Place(8, "a GPU", memory=100)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(new_project(tmp_path_factory.mktemp("plan") / "mini"), BRIEF)


def forget(root: Path) -> None:
    """Remove what was trained from the cache."""
    for name in ("adapters", "finetune_sweep"):
        shutil.rmtree(root / ".lora-cache" / name)


@pytest.mark.parametrize(
    ("count", "asked", "place", "cost", "parts"),
    [
        (6, None, ROOM, Cost(), 6),
        (64, None, ROOM, Cost(), 8),  # at once
        (64, 16, ROOM, Cost(), 16),
        (4, 16, ROOM, Cost(), 4),
        (8, None, ROOM, Cost(20, 10), 8),
        (64, None, ROOM, Cost(20, 20), 16),  # four fit beside the base
        (8, None, ROOM, Cost(seconds=1.0), 1),  # 8 s of work, 5 s to start
        (8, None, ROOM, Cost(seconds=3.0), 4),
        (8, None, ROOM, Cost(seconds=60.0), 8),
        (8, None, ROOM, Cost(20, 40, seconds=0.1), 4),  # memory needs what time does not pay
        (8, None, ROOM._replace(is_shared=True), Cost(seconds=60.0), 1),
        (2, None, ROOM, Cost(200, 10), 2),  # the base alone does not fit
    ],
)
def test_units_are_as_many_as_fit_and_pay(
    count: int, asked: int | None, place: Place, cost: Cost, parts: int
) -> None:
    found, why = parts_of(count, asked, place, cost)
    assert found == parts
    assert bool(why) == (asked is None and parts < min(count, place.at_once))


def test_the_plan_is_told_before_anything_starts(project: Path) -> None:
    told = lora(*SWEEP, "--on", "local", cwd=project)
    assert told.returncode == 0, told.stderr
    plan, lines = told.stderr.splitlines()[:5], iter(told.stderr.splitlines())
    assert "3 adapters, in 1 unit on local (local)" in plan[0]
    assert "one unit uses all cores of this machine; --parts divides it anyway" in plan[1]
    assert any("memory of a unit: " in line and "by the calculator" in line for line in lines)
    assert any("time: about " in line and "a few steps" in line for line in lines)


def test_a_unit_that_ran_out_of_memory_is_halved_once(project: Path) -> None:
    whole = swept_weights(project)
    forget(project)
    run = find_run(project, "")
    end_unit(run.unit_folder(1), NO_MEMORY, "out of memory")
    command = [*SWEEP, "--on", "local"]
    told = lora(*command, cwd=project)
    assert told.returncode == 0, told.stderr
    words = "ran out of memory; units 2, 3 make half of it each"
    assert f"unit 1 (rank-1 rank-2 rank-4) {words}" in told.stderr
    made = [read_unit(run.unit_folder(number)) for number in (2, 3)]
    assert [(unit.label, unit.half_of) for unit in made] == [("rank-1 rank-2", 1), ("rank-4", 1)]
    assert swept_weights(project) == whole

    # a half is not halved; the same command starts it again, once
    forget(project)
    end_unit(run.unit_folder(2), NO_MEMORY, "out of memory on node7")
    assert lora(*command, cwd=project).returncode == 0
    assert run.numbers() == [1, 2, 3] and len(attempts(run.unit_folder(2))) == 2
    assert swept_weights(project) == whole


@pytest.mark.parametrize("folder", ["", "unit"])
def test_a_lack_of_memory_has_an_exit_code_in_a_unit(tmp_path: Path, folder: str) -> None:
    code = "import cli.main; cli.main.app = lambda **_: (_ for _ in ()).throw(MemoryError('big'))\n"
    environment = {key: value for key, value in os.environ.items() if key != "LORA_WORK"}
    if folder:
        environment["LORA_WORK"] = str(tmp_path)
    told = subprocess.run(
        [sys.executable, "-c", f"{code}cli.main.main()"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert told.returncode == (NO_MEMORY if folder else 1)
    assert told.stderr.startswith("error: out of memory (big)")


def test_the_kernel_s_kills_are_read_of_this_cgroup(tmp_path: Path) -> None:
    assert oom_kills(tmp_path) == 0
    events = tmp_path / "sys/fs/cgroup/job_7/step_batch/memory.events"
    events.parent.mkdir(parents=True)
    events.write_text("low 0\nmax 12\noom 3\noom_kill 2\n")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("1:name=systemd:/x\n0::/job_7/step_batch\n")
    assert oom_kills(tmp_path) == 2


def test_what_slurm_stopped_for_memory_has_failed_for_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_fleet(tmp_path, ["rank-1", "rank-2"], cluster="pool")
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\necho '42_2|OUT_OF_MEMORY|node5|OutOfMemory'\n")
    squeue.chmod(0o755)
    (tmp_path / "fleet.yaml").write_text("pool: {engine: slurm}")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    run.jobs = [("42", [1, 2])]
    _, state = run.states()
    assert (state.state, state.code, state.node) == ("failed", NO_MEMORY, "node5")
    ending = ended(run.unit_folder(2))
    assert ending is not None and ending.code == NO_MEMORY
