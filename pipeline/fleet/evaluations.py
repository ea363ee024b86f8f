"""`lora evaluate --adapter … --on NAME`: the base in a unit, then the adapters in chunks."""

import hashlib
import json
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

from pipeline.evaluation.measured_entries import FIRST, MeasuredEntries
from pipeline.evaluation.measuring import measuring
from pipeline.files import artifact
from pipeline.files.text import counted
from pipeline.fleet.plan import Cost, divided, parts_of, plan_notes
from pipeline.fleet.run import open_run, wait
from pipeline.fleet.unit import Unit, unit_of
from pipeline.project.cache import SHORT_KEY
from pipeline.project.entries import open_cache
from pipeline.project.runner import Event
from pipeline.project.stage_graph import Project

STAGE = "evaluate"


class FleetEvaluation:
    """Adapters that are measured in units; the ordinary evaluation then has them in the cache."""

    def __init__(
        self,
        project: Project,
        overrides: Sequence[str],
        adapters: Sequence[Path],
        base: Path | None,
        cluster: str,
        parts: int | None = None,
    ) -> None:
        """`overrides`: those that `project` was opened with. `parts`: units. Raises UserError."""
        from pipeline.stages.evaluate import first_folder, measured_name

        self._project, self._overrides, self._parts = project, list(overrides), parts
        self._base = [] if base is None else ["--base", str(base.absolute())]
        # a label has a name for each adapter, without spaces
        names = (measured_name(project, adapter).replace(" ", "_") for adapter in adapters)
        self._adapters = dict(zip(names, adapters, strict=True))
        key = measuring(project).key
        facts = json.dumps([key, *map(str, adapters)])
        name = hashlib.sha256(facts.encode()).hexdigest()[:SHORT_KEY]
        self.run = open_run(project, STAGE, name, cluster)
        digest = artifact.digest(first_folder(project))
        self._entries = MeasuredEntries(open_cache(project), key, digest)

    def events(self) -> Generator[Event, None, None]:
        """Measure what the cache has not. Raises UserError if something was not measured."""
        missing = [
            name
            for name, adapter in self._adapters.items()
            if not self._entries.has(artifact.digest(adapter))
        ]
        if not missing:
            return
        if not self._entries.has(FIRST):
            yield from self._make("the base", [self._unit([])])
        parts, why = parts_of(len(missing), self._parts, self.run.engine.place(), Cost())
        units = [self._unit(names) for names in divided(missing, parts)]
        yield from self._make(counted(len(missing), "adapter"), units, why)

    def _make(self, what: str, units: Sequence[Unit], why: str = "") -> Iterator[Event]:
        yield from plan_notes(self.run, f"{STAGE}: {what}", units, Cost(), why)
        yield from self.run.start(units)
        yield from wait(self.run)

    def _unit(self, names: Sequence[str]) -> Unit:
        command = [STAGE, "--part", *self._base]
        for name in names:
            command += ["--adapter", str(self._adapters[name].absolute())]
        return unit_of(self._project, self._overrides, command, " ".join(names) or "base", STAGE)
