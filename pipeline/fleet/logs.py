"""What units log as they train, as the logs of runs: a sweep's units have one run between them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from pipeline.files.file_tail import file_stamp
from pipeline.files.text import natural_sort_key
from pipeline.fleet.run import FLEET, UNITS, look_at_runs
from pipeline.fleet.states import ENDED, Fleet, UnitState
from pipeline.fleet.unit import EXIT
from pipeline.project.logs import run_state
from pipeline.project.logs.run_log import LOSS
from pipeline.project.logs.runs import LogFiles, curves
from pipeline.project.stage_graph import RUNS


@dataclass(frozen=True)
class UnitLogs:
    """Curves of a stage's units. `units`: their folders by number; `params`: what they run with."""

    stage: str
    folder: Path  # the units' run folder, of a sweep the folder of the fleet's run
    curves: Sequence[LogFiles]
    units: Mapping[int, Path]
    params: Mapping[str, Any]
    has_ended: bool


def unit_logs(root: Path, stages: Mapping[str, bool]) -> list[UnitLogs]:
    """Of the runs that go on in a project, and the newest of each stage.

    `stages`: those wanted, and whether they have a curve for each adapter.
    """
    found = list[UnitLogs]()
    for fleet in look_at_runs(root):
        groups = dict[str, list[UnitState]]()
        for unit in fleet.units:
            if unit.stage in stages:
                key = unit.stage if stages[unit.stage] else f"{unit.stage} {unit.number}"
                groups.setdefault(key, []).append(unit)
        logs = (_logs_of(fleet, units, stages[units[0].stage]) for units in groups.values())
        found += [unit for unit in logs if unit.curves]
    return found


def log_stamps(root: Path) -> list[int]:
    """Change when `unit_logs` may return others: a log that grows is the same."""
    numbers = list[int]()
    for folder in sorted((root / RUNS).glob(f"*/{FLEET}/*/{UNITS}/*")):
        if ending := file_stamp(folder / EXIT):
            numbers += ending
        else:
            logs = [*folder.glob(f"{RUNS}/*/{LOSS}"), *folder.glob(f"{RUNS}/*/[!.]*/{LOSS}")]
            numbers += [hash(log) for log in sorted(logs)]
    return numbers


def _logs_of(fleet: Fleet, units: Sequence[UnitState], sweeps: bool) -> UnitLogs:
    stage = units[0].stage
    folders = {unit.number: fleet.folder / UNITS / str(unit.number) for unit in units}
    runs = [folder / RUNS / stage for folder in folders.values()]
    # an adapter of a unit that ran out of memory trains again in one of its halves
    every = chain.from_iterable(curves(run, sweeps) for run in runs)
    by_name = {files.name: files for files in every if files.loss.is_file()}
    noted = (run_state.read_settings(run, "run") for run in runs)
    settings = next(filter(None, noted), None)
    return UnitLogs(
        stage,
        fleet.folder if sweeps else runs[0],
        sorted(by_name.values(), key=lambda files: natural_sort_key(files.name)),
        folders,
        settings.params if settings else {},
        all(unit.state in ENDED for unit in units),
    )
