"""How work is divided into units: as many as there is room for, unless more do not pay."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import ceil
from statistics import median

from pipeline.errors import UserError
from pipeline.files.text import counted, duration, in_units
from pipeline.fleet.engines import Place
from pipeline.fleet.run import FleetRun, find_runs
from pipeline.fleet.unit import Unit, attempts, ended, journal, read_unit
from pipeline.project.runner import Event, Note
from pipeline.project.stage_graph import Project, Stage

START = 5.0  # seconds that a unit takes to its first step, on MiniGPT; more with a larger base


@dataclass(frozen=True)
class Cost:
    """What adapters take that train together. Zeros are not known.

    `shared`: bytes that the base takes; `bytes`, `seconds`: of each adapter beside it; `source`:
    where the time is from.
    """

    shared: int = 0
    bytes: int = 0
    seconds: float = 0.0
    source: str = ""

    def memory(self, count: int) -> int:
        """Bytes of a unit with so many adapters; 0: not known."""
        return self.shared + count * self.bytes


def parts_of(count: int, asked: int | None, place: Place, cost: Cost) -> tuple[int, str]:
    """How many units `count` adapters get, and why it is not as many as there is room for."""
    if asked is not None:
        return min(asked, count), ""
    least = 1
    if place.memory and cost.bytes:
        most = max(1, (place.memory - cost.shared) // cost.bytes)  # adapters that fit together
        least = ceil(count / most)
    room = max(least, min(count, place.at_once))
    paying, why = room, ""
    if place.is_shared:
        paying, why = least, "one unit uses all cores of this machine"
    elif cost.seconds:
        paying, why = int(count * cost.seconds / START), f"a unit takes {START:.0f} s to start"
    parts = min(room, max(least, paying))
    return parts, f"{why}; --parts divides it anyway" if parts < room else ""


def divided(names: Sequence[str], parts: int) -> list[list[str]]:
    """Names in order, in parts whose sizes differ by one at most; none is empty."""
    found, start = list[list[str]](), 0
    for left in range(parts, 0, -1):
        size = ceil((len(names) - start) / left)
        found.append(list(names[start : start + size]))
        start += size
    return found


def plan_notes(
    run: FleetRun, what: str, units: Sequence[Unit], cost: Cost, why: str = ""
) -> Iterator[Event]:
    """The plan in words. `what`: the work; `why` it is not in more units."""
    place, of = run.engine.place(), f"{run.cluster} ({run.settings.engine})"
    yield Note(f"{what}, in {counted(len(units), 'unit')} on {of}; run {run.name}")
    if not units:  # all are there already
        return
    most = max(len(unit.label.split()) for unit in units)
    if why:
        yield Note(f"  not in more units: {why}")
    yield Note(f"  {min(len(units), place.at_once)} at once, each has {place.device}")
    if memory := cost.memory(most):
        room = f" of {in_units(place.memory)}" if place.memory else ""
        yield Note(f"  memory of a unit: {in_units(memory)}{room}, by the calculator")
    time = "not known before the first steps"
    if cost.seconds:
        rounds = ceil(len(units) / place.at_once)
        time = f"about {duration(rounds * (START + most * cost.seconds))}, by {cost.source}"
    yield Note(f"  time: {time}")


def cost_of_adapters(project: Project, run: FleetRun) -> Generator[Event, None, Cost]:
    """Of a sweep's adapters: memory by the calculator, time by units or by a few steps here."""
    from pipeline.stages.registry import METHODS

    memory = memory_of(project, METHODS["lora"])
    seconds, source = _earlier(project, run), "units that ended there"
    if not seconds and not run.engine.has_queue:
        seconds, source = (yield from _timed(project)), "a few steps of one adapter"
    return replace(memory, seconds=seconds, source=source)


def memory_of(project: Project, stage: Stage) -> Cost:
    """Bytes of the base, and of what a stage's settings train beside it; 0 if not known."""
    from pipeline.calc.memory import predict
    from pipeline.calc.method import configure
    from pipeline.calc.sources.open_model import open_model
    from pipeline.stages.registry import COUNTED, model_source, options_of_stage

    if stage.method not in COUNTED:
        return Cost()
    try:
        options = options_of_stage(project, stage)
        if options.get("embeddings") != "new_rows":
            options.pop("new_rows", None)
        model = open_model(model_source(project)).shapes
        _, method, run = configure(model, COUNTED, stage.method, **options)
        memory = predict(model, method, run)
    except UserError:  # a model that the calculator does not count
        return Cost()
    shared = memory.weights + memory.overhead
    return Cost(shared, memory.peak - shared)


def _earlier(project: Project, run: FleetRun) -> float:
    """Seconds for each adapter of the units that ended on this cluster; 0 if there is none."""
    found = list[float]()
    for other in find_runs(project.root):
        if (other.stage, other.cluster) != (run.stage, run.cluster):
            continue
        for folder in map(other.unit_folder, other.numbers()):
            ending = ended(folder)
            if not ending or ending.code or len(attempts(folder)) != 1:
                continue
            with suppress(UserError):  # a damaged unit of another run is no matter here
                unit = read_unit(folder)
                if (seen := journal(folder, unit)) and seen.total and seen.seconds:
                    found.append(seen.seconds / len(unit.label.split()))
    return median(found) if found else 0.0


def _timed(project: Project) -> Generator[Event, None, float]:
    """Seconds of one adapter, by a few steps of finetune_lora here; 0 if it cannot train."""
    from pipeline.stages.quickstart import try_stage
    from pipeline.stages.registry import METHODS

    try:
        trial = yield from try_stage(project, METHODS["lora"])
    except UserError:
        return 0.0
    return sum(trial.seconds) / 2
