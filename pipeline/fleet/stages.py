"""Stages on a fleet: methods, seeds, settings and projects, each a unit, after what they need."""

import hashlib
import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import TopologicalSorter
from itertools import product
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.fleet.plan import Cost, memory_of, plan_notes
from pipeline.fleet.run import incomplete, open_run, wait
from pipeline.fleet.unit import Unit, unit_of
from pipeline.project.cache import SHORT_KEY, cache_key
from pipeline.project.entries import open_cache
from pipeline.project.params.edit import dump_inline
from pipeline.project.runner import Event, input_facts, run
from pipeline.project.stage_graph import Project, Stage
from pipeline.stages.registry import GRAPH, METHODS


@dataclass(frozen=True)
class StageRun:
    """A stage of a project that was opened with `overrides`. `more`: further options of `lora`."""

    project: Project
    overrides: Sequence[str]
    stage: Stage
    more: Sequence[str] = ()

    @property
    def label(self) -> str:
        """Such as finetune_lora seed=1, without spaces in between."""
        varied = (override.rpartition(".")[2] for override in self.overrides)
        return ",".join((self.stage.name, *varied))

    def unit(self, nodes: int) -> Unit:
        """The unit that makes it."""
        command = [*self.stage.command.split()[1:], *self.more]
        return unit_of(self.project, self.overrides, command, self.label, self.stage.name, nodes)

    def is_made(self) -> bool:
        """Whether the cache has its result. Raises UserError if what it needs is not there."""
        key = cache_key(input_facts(self.project, self.stage))
        return open_cache(self.project).has(self.stage.name, key)


class FleetStages:
    """Stages whose units run as soon as what they need is in their project."""

    def __init__(self, wanted: Sequence[StageRun], cluster: str, nodes: int = 1) -> None:
        """`nodes`: machines that train each stage together. Raises UserError."""
        first = wanted[0]
        facts = [[str(w.project.root), w.stage.name, *w.overrides, *w.more] for w in wanted]
        name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:SHORT_KEY]
        self._wanted, self._nodes = wanted, nodes
        self._of_several = len({stage.project.root for stage in wanted}) > 1  # projects
        self.run = open_run(first.project, first.stage.name, name, cluster, nodes)

    def events(self) -> Generator[Event, None, None]:
        """Make what they need, then the stages; results are in the cache. Raises UserError."""
        for needed in _waves(self._wanted):
            yield from self._make(needed, nodes=1)
            for made in needed:  # a copy from the cache
                yield from run(made.project, made.stage)
        yield from self._make(self._wanted, self._nodes)

    def _make(self, stages: Sequence[StageRun], nodes: int) -> Generator[Event, None, None]:
        missing = [stage for stage in stages if not stage.is_made()]
        if not missing:
            return
        units = [self._unit(stage, nodes) for stage in missing]
        costs = [memory_of(stage.project, stage.stage) for stage in missing if nodes == 1]
        largest = max(costs, key=lambda cost: cost.memory(1), default=Cost())
        what = f"{len(units)} of {len(stages)} results"
        yield from plan_notes(self.run, what, units, largest)
        yield from self.run.start(units)
        yield from wait(self.run)
        if any(not stage.is_made() for stage in missing):
            raise incomplete(self.run, missing[0].project.cache)

    def _unit(self, stage: StageRun, nodes: int) -> Unit:
        unit = stage.unit(nodes)
        if self._of_several:
            return replace(unit, label=f"{stage.project.root.name}/{unit.label}")
        return unit


def _waves(wanted: Sequence[StageRun]) -> list[list[StageRun]]:
    """The stages that `wanted` need and their projects do not have, in the order of the DAG."""
    graph = dict[tuple[Path, str], set[tuple[Path, str]]]()
    projects = {stage.project.root: stage.project for stage in wanted}

    def add(project: Project, stage: Stage) -> None:
        node = project.root, stage.name
        if node in graph:
            return
        missing = [
            project.stages[need]
            for need in project.needs(stage)
            if need in project.stages and not project.artifact(need).is_dir()
        ]
        graph[node] = {(project.root, need.name) for need in missing}
        for need in missing:
            add(project, need)

    for stage in wanted:
        add(stage.project, stage.stage)
    names = {(stage.project.root, stage.stage.name) for stage in wanted}
    sorter = TopologicalSorter(graph)
    sorter.prepare()
    waves = list[list[StageRun]]()
    while sorter.is_active():
        ready = sorter.get_ready()
        sorter.done(*ready)
        wave = [
            StageRun(projects[root], (), projects[root].stages[name])
            for root, name in ready
            if (root, name) not in names
        ]
        waves += [wave] if wave else []
    return waves


def varied(
    paths: Sequence[Path],
    methods: Sequence[str],
    vary: Mapping[str, Sequence[Any]],
    overrides: Sequence[str],
) -> list[StageRun]:
    """Every method with every combination of `vary`'s values in every project. Raises UserError.

    A key alone, such as seed, is each method's own.
    """
    for method in methods:
        if method not in METHODS:
            raise UserError(f"{method} is not a method. There is {', '.join(METHODS)}. Name one.")
    runs = list[StageRun]()
    for path, method, values in product(paths, methods, product(*vary.values())):
        name = METHODS[method].name
        chosen = list(overrides)
        for key, value in zip(vary, values, strict=True):
            chosen.append(f"{key if '.' in key else f'{name}.{key}'}={dump_inline(value)}")
        project = Project.load(path, GRAPH, chosen)
        runs.append(StageRun(project, chosen, project.stage(name)))
    return runs
