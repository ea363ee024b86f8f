"""A sweep on a fleet: a pass of its search is divided into parts, each a unit."""

from collections.abc import Generator, Iterator, Sequence

from pipeline.errors import UserError
from pipeline.files.text import counted
from pipeline.fleet.plan import Cost, cost_of_adapters, divided, parts_of, plan_notes
from pipeline.fleet.run import incomplete, open_run, wait
from pipeline.fleet.unit import Unit, unit_of
from pipeline.project.cache import ADAPTERS, SHORT_KEY, cache_key
from pipeline.project.entries import open_cache
from pipeline.project.entries.adapter_entries import outcomes
from pipeline.project.runner import Event, input_facts
from pipeline.project.stage_graph import Project
from pipeline.stages.methods.sweep import STAGE, WHOLE, Passes, entry_keys


class FleetSweep:
    """A sweep whose adapters train in units; the sweep itself then takes them from the cache."""

    def __init__(
        self, project: Project, overrides: Sequence[str], cluster: str, parts: int | None = None
    ) -> None:
        """`overrides`: those that `project` was opened with. `parts`: units of a pass.

        The run of the same sweep that is there is taken up again. Raises UserError.
        """
        self._project, self._overrides, self._parts = project, list(overrides), parts
        stage = project.stage(STAGE.name)
        if stage.check:
            stage.check(project)
        self._facts = input_facts(project, stage)
        self.run = open_run(project, stage.name, cache_key(self._facts)[:SHORT_KEY], cluster)
        self._cache = open_cache(project)

    def events(self) -> Generator[Event, None, None]:
        """Train what the cache has not, pass after pass. Raises UserError."""
        passes = Passes(self._project)
        while adapters := passes.ask():
            keys = entry_keys(self._project, self._facts, adapters)
            if not keys:
                raise UserError(WHOLE)
            missing = [name for name, key in keys.items() if not self._cache.has(ADAPTERS, key)]
            if missing:
                yield from self._start(missing, len(adapters))
                yield from wait(self.run, self._halves)
            if not (made := outcomes(self._cache, keys)):
                raise incomplete(self.run, self._project.cache)
            passes.tell(made)

    def _start(self, missing: Sequence[str], total: int) -> Iterator[Event]:
        """Submit units for adapters that none has yet, and those that did not end well."""
        taken = {name for unit in self.run.states() for name in unit.label.split()}
        new = [name for name in missing if name not in taken]
        units, cost, why = list[Unit](), Cost(), ""
        if new:
            cost = yield from cost_of_adapters(self._project, self.run)
            parts, why = parts_of(len(new), self._parts, self.run.engine.place(), cost)
            units = [part(self._project, self._overrides, names) for names in divided(new, parts)]
        cached = f", {total - len(missing)} from the cache" if len(missing) < total else ""
        what = f"{STAGE.name}: {counted(len(missing), 'adapter')}{cached}"
        yield from plan_notes(self.run, what, units, cost, why)
        yield from self.run.start(units, self._halves, missing)

    def _halves(self, unit: Unit) -> list[Unit]:
        names = unit.label.split()
        halves = divided(names, 2) if len(names) > 1 else []
        return [part(self._project, self._overrides, half) for half in halves]


def part(project: Project, overrides: Sequence[str], names: Sequence[str]) -> Unit:
    """The unit that trains these adapters of a pass; `project` was opened with `overrides`."""
    command = ["finetune", "sweep", "--only", ",".join(names)]
    return unit_of(project, overrides, command, " ".join(names), STAGE.name)
