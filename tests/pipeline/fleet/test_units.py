"""Units on the devices of this machine: what an attempt leaves, and sweeps that train in parts."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from cli import console
from pipeline.errors import AGAIN, UserError
from pipeline.fleet.engines import Queued
from pipeline.fleet.plan import divided
from pipeline.fleet.run import FleetRun, find_run
from pipeline.fleet.settings import Cluster, read_cluster
from pipeline.fleet.unit import Unit, attempts, end_unit, ended, write_unit
from tests.conftest import Lora
from tests.helpers.fleets import here, new_fleet
from tests.helpers.projects import (
    BRIEF,
    LORA,
    lora,
    make_base,
    new_project,
    refusal,
    swept_weights,
    wait_for,
)
from tests.helpers.run_folders import journal

SWEEP = ["finetune", "sweep", "--set", "finetune_lora.epochs=2"]
GRID = ["--grid", "rank=1,2,4"]
LONG = ["--set", "finetune_lora.epochs=4000", "--checkpoint-every", "20"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(new_project(tmp_path_factory.mktemp("fleet") / "mini"), BRIEF)


@pytest.fixture
def project(made: Path) -> Iterator[Path]:
    yield made
    for folder in ("runs", ".lora-cache"):
        subprocess.run(["rm", "-rf", made / folder], check=True)


def only_run(root: Path) -> FleetRun:
    return find_run(root, "")


def listed(root: Path) -> list[Any]:
    told = lora("fleet", "--json", cwd=root)
    assert told.returncode == 0, told.stderr
    return list(json.loads(told.stdout))


def unit_at(folder: Path, command: Sequence[str]) -> Path:
    write_unit(folder, Unit(command, "it", str(folder.parent), "finetune_lora", str(folder)))
    return folder


def attempt(folder: Path, **environment: str) -> int:
    command = [sys.executable, "-P", "-m", "lora_workbench", "fleet", "unit", str(folder)]
    return subprocess.run(command, env={**os.environ, **environment}, check=False).returncode


# Settings


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must map names to clusters"),
        (
            "pool: {engine: pbs}",
            "pool.engine must be one of local, ray, slurm, got 'pbs'. Edit fleet.yaml",
        ),
        ("pool: {engin: slurm}", "unknown key pool.engin. Did you mean engine?"),
        (
            "pool: {time: soon}",
            "pool.time must be a duration such as 90s, 30m, 4h or 2d, got 'soon'",
        ),
        ("pool: {gpus: 1}", "pool.gpus does nothing with engine: local. Take it out of fleet.yaml"),
        ("pool: {engine: slurm, address: 'a:1'}", "pool.address does nothing with engine: slurm"),
        ("pool: {engine: ray, time: 4h}", "pool.time does nothing with engine: ray"),
        ("pool: {engine: ray, address: here}", "pool.address must be HOST:PORT of a head of Ray"),
        ("pool: {memory: much}", "pool.memory must be a size such as 500M or 32G"),
        ("other: {engine: slurm}", "--on pool: .*has no such cluster. There is local, other. Add"),
    ],
)
def test_a_wrong_fleet_yaml_is_refused_by_its_key(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "fleet.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_cluster(tmp_path, "pool")


def test_a_cluster_is_read_and_local_needs_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_cluster(tmp_path, "local") == Cluster()
    other = tmp_path / "mine.yaml"
    other.write_text("pool: {engine: slurm, time: 4h, warn: 90s, options: {partition: gpu}}")
    monkeypatch.setenv("LORA_FLEET", str(other))
    pool = read_cluster(tmp_path, "pool")
    assert (pool.time, pool.warn, dict(pool.options)) == (14_400, 90, {"partition": "gpu"})


@pytest.mark.parametrize(("count", "parts"), [(1, 1), (7, 3), (8, 8), (9, 4), (64, 16)])
def test_parts_are_all_names_in_order_and_differ_by_one(count: int, parts: int) -> None:
    names = [f"rank-{n}" for n in range(count)]
    found = divided(names, parts)
    assert list(chain(*found)) == names and len(found) == parts
    assert max(map(len, found)) - min(map(len, found)) <= 1


# An attempt


def test_an_attempt_that_ends_well_and_one_with_an_error(tmp_path: Path) -> None:
    good = unit_at(tmp_path / "good", ["calc", "--model", "minigpt"])
    assert attempt(good, SLURMD_NODENAME="node7") == 0
    ending = ended(good)
    assert ending is not None and ending.code == 0
    assert [made.node for made in attempts(good)] == ["node7"]
    assert "parameters" in (good / "log").read_text()

    bad = unit_at(tmp_path / "bad", ["calc", "--model", "nothing-like-it"])
    assert attempt(bad) == 1
    ending = ended(bad)
    assert ending is not None and ending.code == 1 and "nothing-like-it" in ending.message
    assert not ending.message.startswith("error")


def test_three_attempts_without_progress_are_the_last(tmp_path: Path) -> None:
    folder = unit_at(tmp_path / "unit", ["calc"])
    lines = [{"node": f"node{n}", "pid": 1, "started": 1.0, "done": 0} for n in (7, 9, 7)]
    (folder / "attempts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert attempt(folder) == 1
    ending = ended(folder)
    assert ending is not None
    assert ending.message.startswith("no progress in 3 attempts (node7, node9, node7). See ")


def test_a_killed_command_is_tried_again_and_a_stopped_one_writes_a_checkpoint(
    project: Path, tmp_path: Path
) -> None:
    command = [*SWEEP, *GRID, *LONG, "--only", "rank-1"]
    write_unit(
        tmp_path / "unit",
        Unit(command, "rank-1", str(project), "finetune_sweep", str(project / "cache")),
    )
    folder, runs = tmp_path / "unit", tmp_path / "unit" / "runs" / "finetune_sweep"

    def begun() -> subprocess.Popen[bytes]:
        process = [sys.executable, "-P", "-m", "lora_workbench", "fleet", "unit", str(folder)]
        started = subprocess.Popen(process)
        before = {path.name for path in runs.glob("checkpoint-*")}
        wait_for(lambda: {p.name for p in runs.glob("checkpoint-*")} - before, 60)
        return started

    process = begun()
    process.send_signal(signal.SIGUSR1)
    assert process.wait(60) == AGAIN and ended(folder) is None
    process = begun()
    assert "resumed after step" in (folder / "log").read_text()
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    os.kill(int(children[0]), signal.SIGKILL)
    assert process.wait(60) == AGAIN and ended(folder) is None
    assert len(attempts(folder)) == 2 and attempts(folder)[1].done > 0


# Sweeps


def test_in_units_of_this_machine_a_sweep_is_one_pass_to_the_bit(project: Path) -> None:
    told = lora(*SWEEP, *GRID, "--on", "local", "--parts", "2", cwd=project)
    assert told.returncode == 0, told.stderr
    assert "3 adapters, in 2 units on local (local)" in told.stderr
    assert "3 of 3 adapters are taken from the cache" in told.stderr and "best:" in told.stdout
    (run,) = listed(project)
    assert [(unit["state"], unit["makes"]) for unit in run["units"]] == [
        ("done", ["rank-1", "rank-2"]),
        ("done", ["rank-4"]),
    ]
    assert "12/12" in lora("fleet", cwd=project).stdout
    assert "in the cache" in lora("fleet", "logs", run["run"][:4], "1", cwd=project).stdout
    told = lora("fleet", "logs", run["run"], "9", cwd=project)
    assert told.returncode == 1 and "has no unit 9. Its units are 1 to 2" in told.stderr
    weights = swept_weights(project)
    assert lora(*SWEEP, *GRID, "--force", cwd=project).returncode == 0
    assert swept_weights(project) == weights and len(weights) == 3

    again = lora("fleet", "collect", run["run"], cwd=project)
    assert again.returncode == 0 and "best:" in again.stdout, again.stderr

    # grown: the units train what is new
    told = lora(*SWEEP, "--grid", "rank=1,2,4,8", "--on", "local", cwd=project)
    assert told.returncode == 0, told.stderr
    assert "1 adapter, 3 from the cache, in 1 unit" in told.stderr


def test_a_unit_s_error_is_told_once_and_the_others_go_on(project: Path) -> None:
    grid = ["--set", "finetune_sweep.grid=[{rank: [1]}, {target_modules: [[nothing]]}]"]
    told = lora(*SWEEP, *grid, "--on", "local", "--parts", "2", cwd=project)
    assert told.returncode == 1 and "Traceback" not in told.stderr
    assert told.stderr.count("finetune_sweep, targets-nothing: ") == 1
    assert "unit 2 (targets-nothing) on " in told.stderr
    assert "1 of 2 units did not end well: 2. See `lora fleet logs " in told.stderr
    (run,) = listed(project)
    assert [unit["state"] for unit in run["units"]] == ["done", "failed"]
    assert "targets-nothing" in run["units"][1]["reason"]

    assert lora("fleet", "collect", run["run"], cwd=project).returncode == 1
    again = lora("fleet", "retry", run["run"], cwd=project)
    assert again.returncode == 1 and "started again: 2" in again.stdout
    (run,) = listed(project)
    assert [unit["attempts"] for unit in run["units"]] == [1, 3]
    told = lora(*SWEEP, "--grid", "rank=1", "--on", "local", cwd=project)
    assert told.returncode == 0 and "1 of 1 adapters are taken from the cache" in told.stderr


def test_a_unit_that_ends_while_the_engine_is_asked_is_not_lost(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = project / "runs/finetune_sweep/fleet/1234abcd"
    run = FleetRun(folder, "finetune_sweep", "local", project, ["finetune"], project)
    run.add([Unit(["calc"], "it", str(project), "finetune_sweep", str(project))])
    asked = list[object]()

    def states(*_: object) -> dict[int, Queued]:
        asked.append(end_unit(run.unit_folder(1), 0))
        return {}

    monkeypatch.setattr(run.engine, "states", states)
    assert [unit.state for unit in run.states()] == ["done"] and asked


def test_units_that_another_terminal_cancels_are_not_started_again(project: Path) -> None:
    command = [LORA, *SWEEP, *GRID, *LONG, "--on", "local", "--parts", "2"]
    waiting = subprocess.Popen(command, cwd=project, stderr=subprocess.PIPE, text=True)
    try:
        unit = "runs/finetune_sweep/fleet/*/units/*"
        wait_for(lambda: len([*project.glob(f"{unit}/runs/*/checkpoint-*")]) > 1, 60)
        told = lora("fleet", "cancel", only_run(project).name, cwd=project)
        assert told.returncode == 0 and "stopped: 1, 2" in told.stdout, told.stderr
        _, errors = waiting.communicate(timeout=120)
    finally:
        waiting.kill()
    assert waiting.returncode == 1 and "2 of 2 units did not end well" in errors
    (run,) = listed(project)
    assert [(unit["state"], unit["attempts"]) for unit in run["units"]] == [("stopped", 1)] * 2


def test_what_a_cluster_cannot_do_is_refused(project: Path) -> None:
    brief = ["finetune", "lora", "--set", "finetune_lora.epochs=1", "--on", "local"]
    for options, message in (
        (["--nnodes", "2"], "--on local runs a unit on one machine. Leave out --nnodes"),
        (["--force"], "Leave out --force"),
        (["--detach"], "--detach: units on local end with this command"),
        (["--node-rank", "1"], "Leave out --rdzv-endpoint and --node-rank"),
    ):
        told = lora(*brief, *options, cwd=project)
        assert message in refusal((told.returncode, told.stdout, told.stderr))


def test_methods_that_are_none_are_refused(project: Path) -> None:
    told = lora("fleet", "run", "lora", "dora", cwd=project)
    message = refusal((told.returncode, told.stdout, told.stderr))
    assert "dora is not a method. There is scratch, full, freeze, lora," in message


def test_units_of_two_projects_are_told_apart(project: Path, tmp_path: Path) -> None:
    second = tmp_path / "second"
    shutil.copytree(project, second)
    folders = [f"--project={folder}" for folder in (project, second)]
    told = lora("fleet", "run", "lora", *folders, "--set=finetune_lora.epochs=2", cwd=project)
    assert told.returncode == 0, told.stderr
    (run,) = listed(project)
    made = [unit["makes"] for unit in run["units"]]
    assert made == [["mini/finetune_lora,epochs=2"], ["second/finetune_lora,epochs=2"]]
    for root in (project, second):
        assert list(root.glob(".lora-cache/finetune_lora/*/adapter_model.safetensors"))


def test_a_requeue_outside_a_job_is_refused(tmp_path: Path) -> None:
    folder = unit_at(tmp_path / "1", ["runs"])
    told = lora("fleet", "unit", "1", "--requeue", cwd=tmp_path, SLURM_JOB_ID="")
    assert "--requeue: SLURM_JOB_ID is not set" in refusal(
        (told.returncode, told.stdout, told.stderr)
    )
    assert not attempts(folder)


def test_what_is_not_there_is_said_with_the_next_step(project: Path) -> None:
    told = lora(*SWEEP, *GRID, "--on", "nowhere", cwd=project)
    assert "--on nowhere: " in refusal((told.returncode, told.stdout, told.stderr))
    (project / "fleet.yaml").write_text("pool: {engine: slurm}")
    try:
        told = lora(*SWEEP, *GRID, "--on", "pool", cwd=project, PATH="/nowhere")
    finally:
        (project / "fleet.yaml").unlink()
    assert "sbatch is not on this machine" in refusal((told.returncode, told.stdout, told.stderr))
    told = lora("fleet", "cancel", "abc", cwd=project)
    assert "abc is not one run of a fleet here. There is none." in told.stderr
    assert "No run of a fleet is here" in lora("fleet", cwd=project).stdout


def test_a_look_at_the_units_loads_no_torch_and_names_what_is_no_unit(project: Path) -> None:
    assert lora(*SWEEP, *GRID, "--on", "local", "--parts", "1", cwd=project).returncode == 0
    code = "import sys; sys.argv = ['lora', 'fleet']; from cli.main import main; "
    code += "import atexit; atexit.register(lambda: print('torch' in sys.modules)); main()"
    told = subprocess.run([sys.executable, "-c", code], cwd=project, capture_output=True, text=True)
    assert told.returncode == 0 and told.stdout.endswith("False\n"), told.stderr
    (unit,) = project.glob("runs/finetune_sweep/fleet/*/units/1/unit.json")
    unit.write_text("[")
    told = lora("fleet", cwd=project)
    assert told.returncode == 0
    assert "unit.json is not a unit. Remove its run" in told.stdout


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--parts", "2"], "--parts and --detach are of what --on sends"),
        (["--on", "local", "--force"], "Leave out --force and --only"),
        (["--on", "local", "--only", "rank-1"], "Leave out --force and --only"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    project: Path, options: list[str], message: str
) -> None:
    told = lora(*SWEEP, *GRID, *options, cwd=project)
    assert message in refusal((told.returncode, told.stdout, told.stderr))
    assert not (project / "runs" / "finetune_sweep").exists()


def test_a_queue_that_does_not_answer_says_nothing_of_its_units(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else all units would be submitted once more whenever the controller is busy."""
    squeue = tmp_path / "squeue"
    squeue.write_text(
        "#!/bin/sh\necho 'squeue: error: Unable to contact slurm controller' >&2\nexit 1\n"
    )
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (tmp_path / "fleet.yaml").write_text("pool: {engine: slurm}")
    run = FleetRun(tmp_path / "run", "finetune_sweep", "pool", tmp_path, jobs=[("12", [1, 2])])
    run.add([Unit(["calc"], name, str(tmp_path), "finetune_sweep", "cache") for name in "ab"])
    assert {unit.state for unit in run.states()} == {"queued"}
    squeue.write_text(
        "#!/bin/sh\necho 'slurm_load_jobs error: Invalid job id specified' >&2\nexit 1\n"
    )
    assert {unit.state for unit in run.states()} == {"waiting"}


def test_halving_says_why_it_is_one_part(project: Path) -> None:
    halving = ["finetune_sweep.search=halving", "finetune_lora.eval_share=0.3"]
    halving += ["finetune_sweep.reduction_factor=2"]
    options = [f"--set={override}" for override in halving]
    told = lora(*SWEEP, *GRID, *options, "--on", "local", cwd=project)
    assert told.returncode == 1 and "halving compares all adapters at each rung" in told.stderr


def test_ctrl_c_stops_the_units_and_the_same_command_goes_on(project: Path) -> None:
    command = [LORA, *SWEEP, *GRID, *LONG[:2], "--on", "local", "--parts", "2"]
    process = subprocess.Popen(command, cwd=project, stderr=subprocess.PIPE, text=True)
    pattern = "runs/finetune_sweep/fleet/*/units/*/runs/*/checkpoint-*"
    wait_for(lambda: len({path.parent for path in project.glob(pattern)}) == 2, 120)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "are stopped; the same command goes on from their checkpoints" in errors
    assert "Traceback" not in errors
    (run,) = listed(project)
    assert {unit["state"] for unit in run["units"]} == {"stopped"}


def test_a_run_is_listed_with_how_far_it_is(
    cli: Lora, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = new_fleet(tmp_path, ["rank-1", "rank-2"])
    here(run, 1)
    folder = run.unit_folder(1) / "runs/finetune_sweep"
    folder.mkdir(parents=True)
    journal(folder, "running", 150, rate=10.0)
    _, out, _ = cli("fleet", cwd=tmp_path)
    lines = out.splitlines()
    assert lines[1] == "25%  0 of 2 units, 1 running  150/600 steps  45 s left"
    assert lines[2].split()[-1] == "adapters" and max(map(len, lines)) <= 80
    monkeypatch.setattr(console.stdout, "_force_terminal", True)
    monkeypatch.setenv("NO_COLOR", "1")
    _, out, _ = cli("fleet", cwd=tmp_path)
    assert out.splitlines()[1].startswith("██▌        25%  0 of 2 units")


def test_what_methods_make_is_not_called_adapters(cli: Lora, tmp_path: Path) -> None:
    new_fleet(tmp_path, ["finetune_lora,seed=1"], ["finetune_lora"])
    code, out, _ = cli("fleet", cwd=tmp_path)
    lines = out.splitlines()
    assert code == 0 and lines[1] == "0 of 1 unit" and lines[2].split()[-1] == "makes"
