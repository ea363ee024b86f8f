"""A sweep on a fleet: a pass of its search is divided into parts, each a unit."""

from collections.abc import Callable, Generator, Sequence
from math import ceil

from pipeline.errors import UserError
from pipeline.fleet.run import FleetRun, UnitState, fleet_folder, read_run, wait
from pipeline.fleet.settings import read_cluster
from pipeline.fleet.unit import Unit
from pipeline.project.adapter_entries import ADAPTERS, outcomes
from pipeline.project.cache import SHORT_KEY, Cache, cache_key
from pipeline.project.runner import Event, Note, input_facts
from pipeline.project.stage_graph import Project
from pipeline.stages.methods.sweep import STAGE, WHOLE, Passes, entry_keys

Report = Callable[[list[UnitState]], object]


def run_sweep(
    project: Project,
    overrides: Sequence[str],
    cluster: str,
    parts: int | None = None,
    report: Report = id,
) -> Generator[Event, None, FleetRun]:
    """Train the adapters of a sweep in units; the sweep itself then takes them from the cache.

    `overrides`: those that `project` was opened with. `parts`: units of a pass. The same call again
    waits for the run that is there. Raises UserError.
    """
    stage = project.stage(STAGE.name)
    if stage.check:
        stage.check(project)
    settings = read_cluster(project.root, cluster)
    facts, cache = input_facts(project, stage), Cache(project.cache)
    folder = fleet_folder(project, stage.name) / cache_key(facts)[:SHORT_KEY]
    run = FleetRun(folder, stage.name, cluster, project.root)
    if folder.is_dir():
        run = read_run(folder)
        run.cluster = cluster
    run.engine.check()
    passes = Passes(project)
    while adapters := passes.ask():
        keys = entry_keys(project, facts, adapters)
        if not keys:
            raise UserError(WHOLE)
        missing = [name for name, key in keys.items() if not cache.has(ADAPTERS, key)]
        if missing:
            going = _adapters_of(run)
            new = [name for name in missing if name not in going]
            count = min(parts or settings.at_once, len(new))
            units = [_unit(project, overrides, names) for names in divided(new, count)]
            yield Note(_plan(len(adapters), len(missing), units, run))
            numbers = run.add(units)
            again = [unit.number for unit in run.states() if unit.state in ("failed", "stopped")]
            if numbers or again:
                run.submit([*again, *numbers])
            yield from wait(run, report)
        if not (made := outcomes(cache, keys)):
            raise UserError(
                f"The units of {run.name} have ended, and the cache in {project.cache} has not all "
                "of their adapters. Is it the folder that the other machines see? Set LORA_CACHE."
            )
        passes.tell(made)
    return run


def divided(names: Sequence[str], parts: int) -> list[list[str]]:
    """Names in order, in parts whose sizes differ by one at most; none is empty."""
    found, start = list[list[str]](), 0
    for left in range(parts, 0, -1):
        size = ceil((len(names) - start) / left)
        found.append(list(names[start : start + size]))
        start += size
    return found


def _unit(project: Project, overrides: Sequence[str], names: Sequence[str]) -> Unit:
    command = ["finetune", "sweep", "--params", project.params.file, "--only", ",".join(names)]
    command += [f"--set={override}" for override in overrides]
    environment = {"LORA_CACHE": str(project.cache.resolve())}
    return Unit(command, " ".join(names), str(project.root), STAGE.name, environment)


def _adapters_of(run: FleetRun) -> set[str]:
    """The adapters that units of the run train."""
    return {name for unit in run.states() for name in unit.label.split()}


def _plan(total: int, missing: int, units: Sequence[Unit], run: FleetRun) -> str:
    cached = f", {total - missing} from the cache" if missing < total else ""
    sizes = [len(unit.label.split()) for unit in units]
    where = f"{run.cluster} ({run.settings.engine})"
    return (
        f"{STAGE.name}: {missing} adapters{cached}, in {len(units)} units of "
        f"{max(sizes, default=0)} on {where}; run {run.name}"
    )
