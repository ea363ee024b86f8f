"""Runs of a fleet made by hand: units whose files say what a test needs."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.fleet.run import FleetRun
from pipeline.fleet.unit import Unit
from tests.helpers.run_folders import journal, write_run, write_sweep

SWEEP = "finetune_sweep"


def new_fleet(
    root: Path, labels: Sequence[str], stages: Sequence[str] = (), cluster: str = "local"
) -> FleetRun:
    """A run whose units wait. `stages`: of each unit, if it is not a sweep's."""
    stage = stages[0] if stages else SWEEP
    run = FleetRun(root / "runs" / stage / "fleet/2d67857b", stage, cluster, root, ["finetune"])
    run.save()
    pairs = zip(labels, stages or [SWEEP] * len(labels), strict=True)
    run.add([Unit(["calc"], label, str(root), name, str(root / "cache")) for label, name in pairs])
    return run


def attempt(
    run: FleetRun, number: int, node: str = "node1", pid: int = 1, ago: float = 3600.0
) -> Path:
    """A unit's attempt; returns the folder of what it makes."""
    row = {"node": node, "pid": pid, "started": time.time() - ago, "done": 0}
    folder = run.unit_folder(number)
    with (folder / "attempts.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    stage = json.loads((folder / "unit.json").read_text(encoding="utf-8"))["stage"]
    return folder / "runs" / str(stage)


def train(
    run: FleetRun, number: int, losses: Mapping[str, float], steps: int, state: str = "running"
) -> Path:
    """An attempt at a unit that trains adapters, at ten steps a second; returns its run folder."""
    folder = attempt(run, number)
    if losses:
        write_sweep(run.unit_folder(number), losses, state=state, steps=steps)
    else:
        write_run(run.unit_folder(number), folder.name, steps, state)
    journal(folder, state, steps, rate=10.0)
    return folder


def here(run: FleetRun, number: int) -> None:
    """Let a unit run on this machine: as this process."""
    from pipeline.fleet.unit import node_name

    attempt(run, number, node_name(), os.getpid())
