"""Sweeps on Slurm: four nodes on this machine, that die, are lost, are downed, and run out of time."""

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.fleet.run import find_run
from tests.helpers.projects import (
    BRIEF,
    LORA,
    lora,
    make_base,
    new_project,
    swept_weights,
    wait_for,
)
from tests.helpers.sent import PATIENCE, Sent, assert_as_in_one_pass
from tests.helpers.slurm import Slurm, cluster

GRID = ["finetune", "sweep", "--grid", "rank=1,2", "--grid", "seed=0,1,2,3"]
LONG = ["--set", "finetune_lora.epochs=600", "--checkpoint-every", "100"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(new_project(tmp_path_factory.mktemp("slurm") / "mini"), BRIEF)


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    with cluster(tmp_path / "slurm") as nodes:
        yield nodes


@pytest.fixture
def project(made: Path, tmp_path: Path) -> Path:
    root = tmp_path / "project"
    shutil.copytree(made, root)
    (root / "fleet.yaml").write_text("pool: {engine: slurm, at_once: 4, time: 1h}")
    return root


@pytest.fixture
def send(project: Path, slurm: Slurm) -> Iterator[Callable[..., Sent]]:
    sent = list[Sent]()

    def start(*arguments: str) -> Sent:
        sent.append(Sent(project, slurm.environment, [*arguments, "--parts", "4"]))
        return sent[-1]

    yield start
    for sweep in sent:
        sweep.kill()


def test_a_grid_in_parts_is_one_pass_to_the_bit(
    project: Path, slurm: Slurm, send: Callable[..., Sent]
) -> None:
    brief = [*GRID, "--set", "finetune_lora.epochs=2"]
    slurm.down(2)
    errors = send(*brief).end()
    assert "8 adapters, in 4 units on pool (slurm)" in errors
    assert "8 of 8 adapters are taken from the cache" in errors
    told = lora("fleet", "--json", cwd=project, SLURM_CONF=slurm.environment["SLURM_CONF"])
    (run,) = json.loads(told.stdout)
    assert {unit["state"] for unit in run["units"]} == {"done"}
    assert {unit["node"] for unit in run["units"]} <= {"node1", "node3", "node4"}
    assert_as_in_one_pass(project, brief)


def test_a_detached_sweep_goes_on_in_the_queue_pass_after_pass(project: Path, slurm: Slurm) -> None:
    search = ["search=optuna", "trials=4", "generation=2", "grid={rank: [1, 2, 4, 8]}"]
    options = [f"--set=finetune_sweep.{option}" for option in search]
    options += ["--set=finetune_lora.epochs=2", "--set=finetune_lora.eval_share=0.25"]
    environment = {"SLURM_CONF": slurm.environment["SLURM_CONF"]}
    command = ["finetune", "sweep", *options]
    told = lora(*command, "--on", "pool", "--detach", cwd=project, **environment)
    assert told.returncode == 0 and "is in the queue" in told.stdout, told.stderr
    assert not (project / "artifacts/sweep").exists()
    wait_for(lambda: (project / "artifacts/sweep/sweep.json").exists(), PATIENCE)
    found = swept_weights(project)
    assert lora(*command, "--force", cwd=project).returncode == 0
    assert swept_weights(project) == found


def test_what_sbatch_refuses_is_said_by_the_key_of_fleet_yaml(project: Path, slurm: Slurm) -> None:
    (project / "fleet.yaml").write_text("pool: {engine: slurm, options: {partition: nowhere}}")
    environment = {"SLURM_CONF": slurm.environment["SLURM_CONF"]}
    told = lora(*GRID, "--on", "pool", cwd=project, **environment)
    assert told.returncode == 1 and "Traceback" not in told.stderr
    assert "pool.options.partition: Slurm refuses it: " in told.stderr


@pytest.mark.slow
@pytest.mark.parametrize("answer", ["y", "n"])
def test_ctrl_c_asks_whether_units_stay_in_the_queue(
    project: Path, slurm: Slurm, answer: str
) -> None:
    terminal, stdin = os.openpty()
    command = [LORA, *GRID, *LONG, "--on", "pool", "--parts", "2"]
    sweep = subprocess.Popen(
        command, cwd=project, env=slurm.environment, stdin=stdin, stderr=subprocess.PIPE, text=True
    )
    try:
        wait_for(lambda: [*project.glob("runs/*/fleet/*/units/2/runs/*/checkpoint-*")], PATIENCE)
        sweep.send_signal(signal.SIGINT)
        os.write(terminal, f"{answer}\n".encode())
        _, errors = sweep.communicate(timeout=PATIENCE)
    finally:
        sweep.kill()
        os.close(terminal)
        os.close(stdin)
    assert "Cancel the units?" in errors and sweep.returncode == 130
    run = find_run(project, "")
    environment = {"SLURM_CONF": slurm.environment["SLURM_CONF"]}
    if answer == "y":
        assert f"the units of {run.name} are stopped" in errors
        wait_for(lambda: not [job for job in slurm.jobs() if job.state == "RUNNING"], PATIENCE)
    else:
        assert f"`lora fleet collect {run.name}` waits for it" in errors
    told = lora(
        "fleet", "retry" if answer == "y" else "collect", run.name, cwd=project, **environment
    )
    assert told.returncode == 0, told.stderr
    told = lora("fleet", "collect", run.name, cwd=project, **environment)
    assert told.returncode == 0 and "best:" in told.stdout, told.stderr
    assert_as_in_one_pass(project, [*GRID, *LONG])


@pytest.mark.slow
def test_a_node_that_dies_costs_the_steps_since_its_checkpoint(
    project: Path, slurm: Slurm, send: Callable[..., Sent]
) -> None:
    sweep = send(*GRID, *LONG)
    wait_for(lambda: sweep.checkpoints(2), PATIENCE)
    slurm.kill(int(sweep.attempts(2)[0]["node"].removeprefix("node")))
    sweep.end()
    first, *_, last = sweep.attempts(2)
    assert last["node"] != first["node"] and last["done"] > 0
    assert "resumed after step" in sweep.log(2)
    assert_as_in_one_pass(project, [*GRID, *LONG])


@pytest.mark.slow
def test_a_node_that_slurm_lost_while_its_unit_goes_on_trains_nothing_twice(
    project: Path, slurm: Slurm, send: Callable[..., Sent]
) -> None:
    sweep = send(*GRID, *LONG)
    wait_for(lambda: sweep.checkpoints(2), PATIENCE)
    slurm.partition(int(sweep.attempts(2)[0]["node"].removeprefix("node")))
    sweep.end()
    assert_as_in_one_pass(project, [*GRID, *LONG])


@pytest.mark.slow
def test_before_the_time_limit_a_unit_writes_its_checkpoint_and_goes_on(
    project: Path, send: Callable[..., Sent]
) -> None:
    (project / "fleet.yaml").write_text("pool: {engine: slurm, at_once: 4, time: 60s, warn: 50s}")
    sweep = send(*GRID, *LONG, "--set", "finetune_lora.epochs=3000")
    sweep.end()
    assert all(len(sweep.attempts(number)) > 1 for number in range(1, 5))
    assert all("resumed after step" in sweep.log(number) for number in range(1, 5))
    assert_as_in_one_pass(project, [*GRID, *LONG, "--set", "finetune_lora.epochs=3000"])


@pytest.mark.slow
def test_preempted_units_write_a_checkpoint_and_go_on(
    project: Path, slurm: Slurm, send: Callable[..., Sent]
) -> None:
    urgent = "PartitionName=urgent", "Nodes=ALL", "PriorityTier=10"
    slurm.run("scontrol", "create", *urgent)
    sweep = send(*GRID, *LONG)
    wait_for(lambda: all(sweep.checkpoints(number) for number in range(1, 5)), PATIENCE)
    options = "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null"
    slurm.run("sbatch", *options, "--wrap=sleep 1")
    sweep.end()
    preempted = [number for number in range(1, 5) if len(sweep.attempts(number)) > 1]
    assert len(preempted) >= 2
    steps = [int(re.findall(r"resumed after step (\d+)", sweep.log(n))[0]) for n in preempted]
    assert any(step % 100 for step in steps)  # not those of the last regular checkpoint
    assert_as_in_one_pass(project, [*GRID, *LONG])


@pytest.mark.slow
def test_cancelled_units_keep_their_checkpoints_and_a_retry_goes_on(
    project: Path, slurm: Slurm, send: Callable[..., Sent]
) -> None:
    environment = {"SLURM_CONF": slurm.environment["SLURM_CONF"]}
    sweep = send(*GRID, *LONG)
    wait_for(lambda: sweep.checkpoints(1) and sweep.checkpoints(2), PATIENCE)
    run = find_run(project, "").name
    told = lora("fleet", "cancel", run, "1", "2", cwd=project, **environment)
    assert told.returncode == 0 and "stopped: 1, 2" in told.stdout, told.stderr
    _, errors = sweep.process.communicate(timeout=PATIENCE)
    assert sweep.process.returncode == 1 and "2 of 4 units did not end well" in errors
    told = lora("fleet", "retry", run, cwd=project, **environment)
    assert told.returncode == 0 and "started again: 1, 2" in told.stdout, told.stderr
    told = lora("fleet", "collect", run, cwd=project, **environment)
    assert told.returncode == 0 and "best:" in told.stdout, told.stderr
    assert "resumed after step" in sweep.log(1)
    assert_as_in_one_pass(project, [*GRID, *LONG])
