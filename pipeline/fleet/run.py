"""A run of a fleet: units of one stage in `runs/STAGE/fleet/ID/`, and the loop that waits for them.

    run.json        cluster, jobs of the engine
    units/N/        the units

`ID` is the beginning of the key of what the run makes. The same command again finds the same run.
"""

import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from pipeline.errors import NO_MEMORY, UserError
from pipeline.files.artifact import write_file
from pipeline.files.file_tail import file_stamp
from pipeline.files.locks import Lock
from pipeline.fleet.engines import ENGINES, Engine, Queued
from pipeline.fleet.settings import Cluster, read_cluster
from pipeline.fleet.states import ENDED, Fleet, State, UnitState, joined, state_by_files
from pipeline.fleet.unit import (
    EXIT,
    MOST_VAIN,
    STOP,
    UNIT,
    Ended,
    Unit,
    attempts,
    begin_anew,
    end_unit,
    ended,
    journal,
    read_unit,
    write_unit,
)
from pipeline.project.entries import STORE
from pipeline.project.runner import Event, Note, Progress
from pipeline.project.stage_graph import RUNS, Project

RUN, UNITS, FLEET, LOCK = "run.json", "units", "fleet", "lock"
FOLLOWS = "LORA_FOLLOWS"  # environment variable of a run's job in the queue: its name
# the commands that start runs
STARTS = (("finetune",), ("train",), ("evaluate",), ("fleet", "run"), ("fleet", "check"))
POLL = 1.0  # seconds between two looks at the units


Halves = Callable[[Unit], Sequence[Unit]]


def no_halves(_unit: Unit) -> Sequence[Unit]:
    """Of units that cannot be divided."""
    return ()


class Detached(Exception):
    """The units are in the queue, and a job that goes on once they have ended."""


@dataclass
class FleetRun:
    """A run, as its folder has it."""

    folder: Path
    stage: str
    cluster: str
    root: Path  # the project's folder
    command: Sequence[str] = ()  # the arguments of `lora` that started it
    place: Path = Path()  # the folder in which they were typed
    jobs: list[tuple[str, list[int]]] = field(default_factory=list)  # of the engine, with units
    detaches: bool = False  # whether a job in the queue waits for the units, and no process
    is_elsewhere: bool = False  # whether another command runs the units, and this one waits
    _lock: Lock | None = None  # of a command whose units end with it

    @property
    def name(self) -> str:
        return self.folder.name

    @cached_property
    def settings(self) -> Cluster:
        """Those of its cluster. Raises UserError."""
        return read_cluster(self.root, self.cluster)

    @cached_property
    def engine(self) -> Engine:
        """The engine of its cluster."""
        return ENGINES[self.settings.engine](self.cluster, self.settings)

    def unit_folder(self, number: int) -> Path:
        """The folder of a unit."""
        return self.folder / UNITS / str(number)

    def numbers(self) -> list[int]:
        """The numbers of its units."""
        names = [path.parent.name for path in (self.folder / UNITS).glob(f"*/{UNIT}")]
        return sorted(int(name) for name in names if name.isdecimal())

    def save(self) -> None:
        """Write run.json."""
        self.folder.mkdir(parents=True, exist_ok=True)
        document = {
            "stage": self.stage,
            "cluster": self.cluster,
            "root": str(self.root),
            "command": list(self.command),
            "place": str(self.place),
            "jobs": self.jobs,
        }
        write_file(self.folder / RUN, json.dumps(document, indent=1) + "\n", durable=True)

    def add(self, units: Sequence[Unit]) -> list[int]:
        """Make folders for more units; returns their numbers."""
        first = max(self.numbers(), default=0) + 1
        for number, unit in enumerate(units, first):
            write_unit(self.unit_folder(number), unit)
        return list(range(first, first + len(units)))

    def start(
        self, units: Sequence[Unit], halves: Halves = no_halves, missing: Collection[str] = ()
    ) -> Iterator[Event]:
        """Submit units that the run has not yet, those that did not end well, and those whose
        results are gone: only the first where this process is the run's job in the queue.

        A unit is told by its label and its project. Where units end with their command, another
        command's are waited for first. `halves`: as of `wait`; `missing`: words of labels without
        a result, beside those of `units`.
        """
        waited = False
        if not self.engine.has_queue:
            waited = yield from self._attend()
        states = self.states()
        there = [read_unit(self.unit_folder(unit.number)) for unit in states]
        known = {(unit.root, unit.label) for unit in there}
        numbers = self.add([unit for unit in units if (unit.root, unit.label) not in known])
        if os.environ.get(FOLLOWS) != self.name:
            words = {*missing, *(word for unit in units for word in unit.label.split())}
            gone = [unit for unit in states if unit.is_whole and words & {*unit.label.split()}]
            if waited:  # what the other command has made was missing before
                gone = []
            again = [unit for unit in states if unit.state in ("failed", "stopped")]
            # of the others `wait` makes halves
            again = [unit for unit in again if not self.halves_of(unit, halves)]
            numbers += [unit.number for unit in (*again, *gone)]
            # what a user asks for anew is not refused for jobs that ended in vain before
            going = {unit.number for unit in states if unit.state in ("queued", "running")}
            jobs = ((job, [n for n in held if n in going]) for job, held in self.jobs)
            self.jobs = [(job, held) for job, held in jobs if held]
        if numbers:
            self.submit(numbers)

    def halves_of(self, state: UnitState, halves: Halves) -> Sequence[Unit]:
        """Two units in place of one that ran out of memory, unless it is a half."""
        unit = read_unit(self.unit_folder(state.number))
        return () if state.code != NO_MEMORY or unit.half_of else halves(unit)

    def _attend(self) -> Generator[Event, None, bool]:
        """Hold the run's lock until this process ends. Returns whether another had it."""
        if self._lock is not None:
            return False
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = Lock(self.folder / LOCK)
        if self._lock.acquire(wait=False):
            return False
        self.is_elsewhere = True
        yield Note(f"{self.name}: {self._lock.holder} runs its units; this command waits")
        self._lock.acquire()
        self.is_elsewhere = False
        return True

    def submit(self, numbers: Collection[int]) -> None:
        """Let the engine start units, anew where they had ended."""
        for number in numbers:
            begin_anew(self.unit_folder(number))
        self.save()
        self.jobs.append((self.engine.submit(self, numbers), sorted(numbers)))
        self.save()

    def script(self) -> str:
        """The shell's line that goes on with the run."""
        command = [sys.executable, "-P", "-m", "lora_workbench", *self.command]
        place, variable = shlex.quote(str(self.place)), f"{FOLLOWS}={self.name}"
        return f"cd {place} && {variable} exec {shlex.join(command)}"

    def refuse_vain(self, numbers: Collection[int]) -> None:
        """Raises UserError for a unit whose jobs end before it begins."""
        for number in numbers:
            jobs = [job for job, units in self.jobs if number in units]
            if len(jobs) - len(attempts(self.unit_folder(number))) >= MOST_VAIN:
                raise UserError(
                    f"unit {number}: its jobs ({', '.join(jobs)}) end before it begins. See the "
                    f"logs in {self.folder}, and `setup` in fleet.yaml."
                )

    def states(self) -> list[UnitState]:
        """What each unit does: by its files, then by the engine's queue."""
        numbers = self.numbers()
        going = [number for number in numbers if ended(self.unit_folder(number)) is None]
        queued = self.engine.states(self, going) if going else {}
        return [self._state(number, queued) for number in numbers]

    def _state(self, number: int, queued: Mapping[int, Queued]) -> UnitState:
        folder = self.unit_folder(number)
        ending = ended(folder)  # once more: it may have ended while the engine was asked
        unit, made = read_unit(folder), attempts(folder)
        node, reason = made[-1].node if made else "", ""
        state: State = "lost" if made else "waiting"
        if ending is not None:
            state, reason = ("failed" if ending.code else "done"), ending.message
        elif number in queued:
            now = queued[number]
            node, reason = now.node or node, now.reason
            if now.state == "no memory":
                end_unit(folder, NO_MEMORY, reason)
                state, ending = "failed", Ended(NO_MEMORY, reason)
            else:
                state = now.state
        elif (folder / STOP).exists():
            state = "stopped"
        seen, code = journal(folder, unit), ending.code if ending else 0
        count = len(made)
        return UnitState(number, unit.label, state, node, count, seen, reason, code, unit.stage)

    def look(self) -> tuple[Sequence[UnitState], str]:
        """What units do, and why only files tell it, if the engine cannot be asked."""
        try:
            return self.states(), ""
        except UserError as error:
            return self.by_files().units, str(error)

    def by_files(self) -> Fleet:
        """What its units do, as far as files tell: the engine is not asked."""
        units = list[UnitState]()
        for number in self.numbers():
            with suppress(UserError):  # others are looked at all the same
                units.append(state_by_files(number, self.unit_folder(number)))
        stamp = file_stamp(self.folder / RUN)
        when = stamp[-1] / 1e9 if stamp else 0.0
        return Fleet(self.name, self.stage, self.cluster, self.folder, when, units)

    @property
    def has_ended(self) -> bool:
        """Whether every unit has ended."""
        return all((self.unit_folder(number) / EXIT).exists() for number in self.numbers())


def open_run(project: Project, stage: str, name: str, cluster: str, nodes: int = 1) -> FleetRun:
    """The run of this name that this command starts, or goes on with.

    `nodes`: machines of a unit, at most. Raises UserError.
    """
    folder = project.root / RUNS / stage / FLEET / name
    run = FleetRun(folder, stage, cluster, project.root, sys.argv[1:], Path.cwd())
    if (folder / RUN).is_file():
        run.jobs = _jobs_before(read_run(folder), run)
    if nodes > 1 and not run.engine.has_gangs:
        raise UserError(
            f"--on {cluster} runs a unit on one machine. Leave out --nnodes, or name a cluster of "
            "Slurm."
        )
    run.engine.check()
    if run.settings.store:
        # for this process, which collects, and what it starts
        os.environ[STORE] = run.settings.store
    return run


def _jobs_before(before: FleetRun, run: FleetRun) -> list[tuple[str, list[int]]]:
    """The jobs of a run that is there already. Raises UserError if they go on elsewhere."""
    if before.cluster != run.cluster:
        units, _ = before.look()
        if any(unit.state in ("queued", "running") for unit in units):
            raise UserError(
                f"{run.name} goes on on {before.cluster}. Wait for it, or stop it first by `lora "
                f"fleet cancel {run.name}`."
            )
        return []
    # those of a command that has ended are over without a queue
    return before.jobs if run.engine.has_queue else []


def read_run(folder: Path) -> FleetRun:
    """The run in a folder. Raises UserError if there is none."""
    try:
        document = json.loads((folder / RUN).read_text(encoding="utf-8"))
        jobs = [(str(job), [int(n) for n in numbers]) for job, numbers in document["jobs"]]
        stage, cluster = str(document["stage"]), str(document["cluster"])
        command = [str(word) for word in document["command"]]
        root, place = Path(document["root"]), Path(document["place"])
        # `lora fleet collect` runs it, and run.json may have come with the project
        if tuple(command[:1]) not in STARTS and tuple(command[:2]) not in STARTS:
            raise ValueError
        return FleetRun(folder, stage, cluster, root, command, place, jobs)
    except (OSError, ValueError, TypeError, KeyError):
        raise UserError(
            f"{folder} is not a run of a fleet. See `lora fleet`, or start one with --on."
        ) from None


def find_runs(root: Path) -> list[FleetRun]:
    """The runs of a project, the newest first."""
    found = list[tuple[float, FleetRun]]()
    for path in (root / RUNS).glob(f"*/{FLEET}/*/{RUN}"):
        with suppress(UserError, OSError):  # it may be removed now
            found.append((path.stat().st_mtime, read_run(path.parent)))
    return [run for _, run in sorted(found, key=lambda pair: -pair[0])]


def look_at_runs(root: Path) -> list[Fleet]:
    """The newest run of each stage, and what else goes on; the newest first."""
    fleets, stages = list[Fleet](), set[str]()
    for run in find_runs(root):
        is_newest = run.stage not in stages
        stages.add(run.stage)
        if is_newest or not run.has_ended:
            fleet = run.by_files()
            if is_newest or fleet.state == "running":
                fleets.append(fleet)
    return fleets


def find_run(root: Path, name: str) -> FleetRun:
    """The run with this name. Raises UserError."""
    runs = find_runs(root)
    named = [run for run in runs if run.name.startswith(name)]
    if len(named) != 1:
        known = ", ".join(run.name for run in runs) or "none"
        raise UserError(f"{name} is not one run of a fleet here. There is {known}.")
    return named[0]


def wait(run: FleetRun, halves: Halves = no_halves) -> Iterator[Event]:
    """Wait until every unit has ended, and start those again that were lost.

    `halves`: two units instead of one that ran out of memory; none if it cannot be divided. Each
    error is told once. Raises UserError if a unit did not end well.
    """
    told = set[int]()
    while True:
        states = run.states()
        for unit in states:
            if parts := run.halves_of(unit, halves):
                yield _divide(run, unit, parts)
        states = run.states()
        for unit in states:
            if unit.state == "failed" and unit.number not in told:
                told.add(unit.number)
                yield Note(f"unit {unit.number} ({unit.label}) on {unit.node}: {unit.reason}")
        again = [unit.number for unit in states if unit.state in ("lost", "waiting")]
        if again:
            run.refuse_vain(again)
            yield Note(f"{run.stage}: units {_listed(again)} are started again")
            run.submit(again)
        yield _progress(states)
        if all(unit.state in (*ENDED, "stopped") for unit in states):
            break
        if run.detaches:
            run.engine.follow(run, run.script())
            raise Detached
        time.sleep(POLL)
    failed = [unit for unit in states if unit.state != "done"]
    if failed:
        raise UserError(
            f"{len(failed)} of {len(states)} units did not end well: "
            f"{_listed([unit.number for unit in failed])}. See `lora fleet logs {run.name} "
            f"{failed[0].number}`; `lora fleet retry {run.name}` tries them again. What the others "
            "made is in the cache."
        )


def incomplete(run: FleetRun, cache: Path) -> UserError:
    """The error where units have ended well and the cache lacks what they made."""
    return UserError(
        f"The units of {run.name} have ended, and the cache in {cache} has not all of their "
        "results. Is it the folder that the other machines see? Set LORA_CACHE, or `store` in "
        "fleet.yaml. Do they have this version of lora? `lora fleet check` compares it."
    )


def _divide(run: FleetRun, unit: UnitState, parts: Sequence[Unit]) -> Note:
    """Start halves in place of a unit; returns what to say."""
    numbers = run.add([replace(part, half_of=unit.number) for part in parts])
    words = f"ran out of memory; units {_listed(numbers)} make half of it each"
    end_unit(run.unit_folder(unit.number), 0, words)
    run.submit(numbers)
    return Note(f"unit {unit.number} ({unit.label}) {words}")


def _progress(states: Sequence[UnitState]) -> Progress:
    journal = joined(states)
    return Progress(journal.done, max(journal.total, 1), journal.text)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def cancel(run: FleetRun, numbers: Sequence[int] = ()) -> list[int]:
    """Stop units, by default all that have not ended; returns their numbers."""
    going = [unit.number for unit in run.states() if unit.state not in ENDED]
    chosen = [number for number in going if not numbers or number in numbers]
    for number in chosen:  # on whichever machine it is
        (run.unit_folder(number) / STOP).touch()
    if chosen:
        run.engine.cancel(run, chosen)
    return chosen
