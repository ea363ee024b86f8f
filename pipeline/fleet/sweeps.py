"""A sweep on a fleet: a pass of its search is divided into parts, each a unit."""

from collections.abc import Generator, Iterator, Sequence
from math import ceil

from pipeline.errors import UserError
from pipeline.fleet.run import open_run, wait
from pipeline.fleet.unit import Unit
from pipeline.project.adapter_entries import outcomes
from pipeline.project.cache import ADAPTERS, SHORT_KEY, Cache, cache_key
from pipeline.project.runner import Event, Note, input_facts
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
        self._facts, self._cache = input_facts(project, stage), Cache(project.cache)
        self.run = open_run(project, stage.name, cache_key(self._facts)[:SHORT_KEY], cluster)

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
                yield from wait(self.run)
            if not (made := outcomes(self._cache, keys)):
                raise UserError(
                    f"The units of {self.run.name} have ended, and the cache in "
                    f"{self._project.cache} has not all of their adapters. Is it the folder that "
                    "the other machines see? Set LORA_CACHE."
                )
            passes.tell(made)

    def _start(self, missing: Sequence[str], total: int) -> Iterator[Event]:
        """Submit units for adapters that none has yet, and those that did not end well."""
        run = self.run
        taken = {name for unit in run.states() for name in unit.label.split()}
        new = [name for name in missing if name not in taken]
        count = min(self._parts or run.settings.at_once, len(new))
        units = [self._unit(names) for names in divided(new, count)]
        cached = f", {total - len(missing)} from the cache" if len(missing) < total else ""
        yield Note(
            f"{STAGE.name}: {len(missing)} adapters{cached}, in {len(units)} units on "
            f"{run.cluster} ({run.settings.engine}); run {run.name}"
        )
        run.start(units)

    def _unit(self, names: Sequence[str]) -> Unit:
        params = self._project.params.file
        command = ["finetune", "sweep", "--params", params, "--only", ",".join(names)]
        command += [f"--set={override}" for override in self._overrides]
        root, cache = str(self._project.root), str(self._project.cache.resolve())
        return Unit(command, " ".join(names), root, STAGE.name, cache)


def divided(names: Sequence[str], parts: int) -> list[list[str]]:
    """Names in order, in parts whose sizes differ by one at most; none is empty."""
    found, start = list[list[str]](), 0
    for left in range(parts, 0, -1):
        size = ceil((len(names) - start) / left)
        found.append(list(names[start : start + size]))
        start += size
    return found
