"""64 adapters in 16 units on four nodes of Slurm, of which ten die at random moments."""

import csv
import json
import random
import shutil
import subprocess
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

from pipeline.fleet.run import FleetRun, find_run, find_runs
from pipeline.fleet.unit import EXIT, attempts, ended, journal, read_unit
from pipeline.project.cache import ADAPTERS
from tests.helpers.projects import BRIEF, LORA, lora, make_base, new_project, swept_weights
from tests.helpers.slurm import Slurm, cluster

GRID = ["--grid", "rank=1,2,4,8", "--grid", f"seed={','.join(map(str, range(16)))}"]
SWEEP = ["finetune", "sweep", *GRID, "--set", "finetune_lora.epochs=400"]
NODES, UNITS, KILLS = 4, 16, 10
PATIENCE = 900.0

pytestmark = pytest.mark.slow


@pytest.fixture
def project(tmp_path: Path) -> Path:
    root = make_base(new_project(tmp_path / "mini"), BRIEF)
    (root / "fleet.yaml").write_text("pool: {engine: slurm, at_once: 4, time: 1h}")
    return root


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[Slurm]:
    with cluster(tmp_path / "slurm", NODES) as nodes:
        yield nodes


class Killer:
    """Kills nodes that run a unit. A node runs again once Slurm has missed it."""

    def __init__(self, slurm: Slurm, run: FleetRun, seed: int) -> None:
        self._slurm, self._run, self._random = slurm, run, random.Random(seed)
        # how much of the work is done when each node dies
        self._moments = sorted(self._random.uniform(0.02, 0.9) for _ in range(KILLS))
        self._dead = list[int]()
        self.killed = list[int]()

    def look(self) -> None:
        """Kill a node if its moment has come, and restart those that Slurm has missed."""
        for node in [node for node in self._dead if "down" in self._slurm.state(node)]:
            self._slurm.restore(node)
            self._dead.remove(node)
        if not self._moments or share_done(self._run) < self._moments[0]:
            return
        running = [node for node in self._busy() if node not in self._dead]
        if running:
            self._moments.pop(0)
            self._dead.append(self._random.choice(running))
            self._slurm.kill(self._dead[-1])
            self.killed.append(self._dead[-1])

    def _busy(self) -> list[int]:
        """Nodes on which an attempt has begun and not ended."""
        jobs = [job for job in self._slurm.jobs() if job.state == "RUNNING"]
        begun = [job for job in jobs if attempts(self._run.unit_folder(job.task or 0))]
        return sorted(int(job.node.removeprefix("node")) for job in begun)


def share_done(run: FleetRun) -> float:
    """Of all steps."""
    shares = []
    for folder in map(run.unit_folder, run.numbers()):
        seen = journal(folder, read_unit(folder))
        shares.append(seen.done / seen.total if seen and seen.total else 0.0)
    return sum(shares) / UNITS


def seconds_beside_the_steps(run: FleetRun) -> dict[int, list[float]]:
    """From each unit's first start to its end, without its steps; by the number of attempts."""
    found = dict[int, list[float]]()
    for folder in map(run.unit_folder, run.numbers()):
        made, steps = attempts(folder), next(folder.glob("runs/finetune_sweep/*/telemetry.csv"))
        with steps.open(encoding="utf-8") as file:
            *_, last = csv.DictReader(file)
        seconds = (folder / EXIT).stat().st_mtime - made[0].started - float(last["seconds"])
        found.setdefault(len(made), []).append(round(seconds, 1))
    return found


def trained_keys(run: FleetRun) -> list[str]:
    """Of each unit once, also where a unit's second attempt repeated its last steps."""
    keys = list[str]()
    for number in run.numbers():
        logs = run.unit_folder(number).glob("runs/**/trained.jsonl")
        keys += {json.loads(line) for path in logs for line in path.read_text().splitlines()}
    return keys


def test_ten_random_deaths_change_no_bit_and_nothing_is_trained_twice(
    project: Path, slurm: Slurm, tmp_path: Path
) -> None:
    seed = random.randrange(1000)
    with (tmp_path / "errors").open("w+") as errors:
        command = [LORA, *SWEEP, "--on", "pool", "--parts", str(UNITS)]
        sweep = subprocess.Popen(command, cwd=project, env=slurm.environment, stderr=errors)
        try:
            slurm.wait_for(lambda: list(find_runs(project)), PATIENCE)
            run = find_run(project, "")
            killer = Killer(slurm, run, seed)

            def has_ended() -> bool:
                killer.look()
                return sweep.poll() is not None

            slurm.wait_for(has_ended, PATIENCE)
        finally:
            sweep.kill()
            sweep.wait()
        errors.seek(0)
        assert sweep.returncode == 0, errors.read()
    made = list(chain.from_iterable(attempts(run.unit_folder(n)) for n in run.numbers()))
    beside = seconds_beside_the_steps(run)
    print(f"{seed=} killed {killer.killed}, {len(made)} attempts; beside the steps {beside} s")
    assert len(killer.killed) == KILLS and len(made) >= UNITS + KILLS
    assert all(ended(run.unit_folder(number)) for number in run.numbers())

    entries = {path.name for path in (project / ".lora-cache" / ADAPTERS).glob("[!.]*/")}
    assert sorted(trained_keys(run)) == sorted(entries) and len(entries) == 64
    found = swept_weights(project)
    shutil.rmtree(project / ".lora-cache" / ADAPTERS)
    told = lora(*SWEEP, "--force", cwd=project)
    assert told.returncode == 0, told.stderr
    assert len(found) == 64 and swept_weights(project) == found
