"""`lora fleet check`: one unit on a cluster tells what its node has, to compare with this machine."""

import os
import shutil
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from secrets import token_hex
from typing import Literal, NamedTuple

import msgspec

from pipeline.errors import UserError
from pipeline.files.locks import flock
from pipeline.files.text import duration, in_units, printable
from pipeline.fleet.run import POLL, FleetRun, cancel, open_run
from pipeline.fleet.settings import Cluster
from pipeline.fleet.states import UnitState
from pipeline.fleet.unit import LOG, LONGEST, Unit, node_name
from pipeline.project.provenance import code_digest, public, versions
from pipeline.project.runner import Event, Note
from pipeline.project.stage_graph import Project

STAGE = "check"  # in the place of one, in a run's path
HERE, THERE, LOCK = "here", "there", "lock"  # files in the shared folder
PATIENCE = 10.0  # seconds after which a user is told why the unit waits
NONE = "not installed"
SHOWN = 8  # characters of a digest
END = "SLURM_JOB_END_TIME"  # environment variable of a job: seconds since the epoch
# without it there are lock files (files/locks.py); where it is each machine's own, two machines may
# train the same result at once
Locks = Literal["shared", "each machine's own", "missing"]


class Facts(msgspec.Struct):
    """What a machine has. The last four are a node's."""

    node: str
    versions: dict[str, str]  # those in keys of the cache
    code: dict[str, str]  # stage → digest of its code
    gpus: list[str]
    cores: int
    memory: int  # bytes
    left: float = 0.0  # seconds until its time limit; 0: not known
    sees: bool = True  # whether it sees files of this machine
    renames: bool = True  # whether it can rename a folder
    locks: Locks = "shared"


class Row(NamedTuple):
    """A line of the comparison. `problem`: what fails because of it, and the next step."""

    what: str
    here: str
    there: str
    problem: str = ""


def facts() -> Facts:
    """Those of this machine."""
    import torch

    from pipeline.files.memory import read_memory
    from pipeline.models.device import cores
    from pipeline.stages.registry import STAGES

    count = torch.cuda.device_count()
    gpus = [torch.cuda.get_device_properties(index) for index in range(count)]
    return Facts(
        node_name(),
        dict(versions("bitsandbytes")),
        {name: code_digest(*stage.code) for name, stage in STAGES.items()},
        [f"{gpu.name}, {in_units(gpu.total_memory)}" for gpu in gpus],
        cores(),
        read_memory().total,
    )


def probe(folder: Path) -> Facts:
    """Those of a node, which tries the shared folder."""
    found = facts()
    with suppress(ValueError):
        found.left = max(0.0, float(os.environ.get(END, "0")) - time.time())
    found.sees = found.renames = False
    found.locks = "missing"
    with suppress(OSError):
        found.sees = (folder / HERE).read_text() == folder.name
        found.locks = _try_lock(folder / LOCK)
        made = folder / f"{THERE}.new"
        made.mkdir()
        (made / THERE).write_text(found.node)
        made.rename(folder / THERE)  # as a result comes to be in the cache
        found.renames = True
    return found


def _try_lock(path: Path) -> Locks:
    """What this machine knows of the lock that another holds."""
    with path.open("a") as file:
        try:
            return "each machine's own" if flock(file, wait=False) else "missing"
        except BlockingIOError:
            return "shared"


def check(
    project: Project, cluster: str, limit: float
) -> Generator[Event, None, tuple[str, list[Row]]]:
    """Run a probe on a cluster; returns the node's name, and the comparison.

    `limit`: seconds that it may take. Raises UserError.
    """
    name = token_hex(4)
    run = open_run(project, STAGE, name, cluster)
    # with a store, machines need not share the cache, but the run's folder
    shared = run.folder.parent if run.settings.store else project.cache
    folder = shared.resolve() / f".check-{name}"
    unit = Unit(["fleet", "probe", str(folder)], STAGE, str(project.root), STAGE, str(folder))
    with ExitStack() as stack:
        stack.callback(_remove, run.folder)
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        try:
            folder.mkdir(parents=True)
            (folder / HERE).write_text(folder.name)
            has_locks = flock(stack.enter_context((folder / LOCK).open("a")))
        except OSError as error:
            raise UserError(f"{folder}: {error.strerror}. Set LORA_CACHE to a folder.") from None
        # after Ctrl-C or too long a time the unit must not stay in the queue
        stack.callback(cancel, run)
        yield from run.start([unit])
        state = yield from _ended(run, limit)
        there = _read(run, state)
        here = facts()
        here.locks = "shared" if has_locks else "missing"
        with suppress(OSError):
            here.sees = (folder / THERE / THERE).read_text() == there.node
        return there.node, compare(here, there, run.settings, folder.parent)


def _remove(folder: Path) -> None:
    """Remove a run's folder, and what was made around it."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):  # another probe's is there
        folder.parent.rmdir()
        folder.parent.parent.rmdir()


def _ended(run: FleetRun, limit: float) -> Generator[Event, None, UnitState]:
    """The unit's last state. Says once why it waits. Raises UserError after so many seconds."""
    begin, told = time.monotonic(), ""
    while True:
        (state,) = run.states()
        if state.state in ("done", "failed"):
            return state
        if state.state in ("waiting", "lost", "stopped"):
            raise UserError(
                f"{run.cluster}: the unit's job has ended without a result. Does a node see "
                f"{run.root}, the cache and this environment? See `setup` in fleet.yaml."
            )
        passed = time.monotonic() - begin
        why = f"{state.state}{f' ({state.reason})' if state.reason else ''}"
        if passed > limit:
            raise UserError(
                f"{run.cluster}: the unit is {why} after {duration(passed)}, and is canceled. Try "
                "again later, or with a longer --wait."
            )
        if passed > PATIENCE and told != why:
            told = why
            yield Note(f"{run.cluster}: the unit is {why}; Ctrl-C cancels it")
        time.sleep(POLL)


def _read(run: FleetRun, state: UnitState) -> Facts:
    """What the unit has printed. Raises UserError."""
    log = run.unit_folder(state.number) / LOG
    if state.state == "done":
        with suppress(OSError, msgspec.MsgspecError):
            lines = log.read_bytes()[-LONGEST:].splitlines()
            return msgspec.json.decode(lines[-1] if lines else b"", type=Facts)
    reason = state.reason or "it printed no facts"
    raise UserError(
        f"{run.cluster}: the probe failed on {state.node}: {reason}. See `setup` in fleet.yaml."
    )


def compare(here: Facts, there: Facts, cluster: Cluster, cache: Path) -> list[Row]:
    """Rows for what differs or matters, those of keys first."""
    rows = list[Row]()
    shorter, longer = public(here.versions), public(there.versions)
    for name in sorted({*shorter, *longer}):
        problem = ""
        if shorter.get(name) != longer.get(name):
            problem = (
                f"results of units are not found: install {name} {shorter.get(name, '')} there"
            )
            if name not in shorter:
                problem = f"results that use {name} are not found: install it here"
        told = here.versions.get(name, NONE), there.versions.get(name, NONE)
        rows.append(Row(name, told[0], told[1], problem))
    rows.append(_code(here.code, there.code))
    gpus = _listed(here.gpus), _listed(there.gpus)
    rows.append(Row("GPUs", gpus[0], gpus[1], _too_few(cluster, there)))
    rows.append(Row("cores", str(here.cores), str(there.cores)))
    rows.append(Row("memory", in_units(here.memory), in_units(there.memory)))
    if there.left:
        is_short = there.left <= cluster.warn
        late = "each attempt ends at once: set warn below time in fleet.yaml" if is_short else ""
        rows.append(Row("time left", "", duration(there.left), late))
    unseen = (
        "" if here.sees and there.sees else f"{cache} is not one folder: let both machines see it"
    )
    rows.append(Row("shared folder", _seen(here.sees), _seen(there.sees), unseen))
    fixed = "" if there.renames or unseen else f"results need rename: move LORA_CACHE from {cache}"
    rows.append(Row("rename", "", "works" if there.renames else "fails", fixed))
    rows.append(Row("flock", here.locks, there.locks))
    return [Row(*map(printable, row)) for row in rows]


def _code(here: Mapping[str, str], there: Mapping[str, str]) -> Row:
    other = sorted(name for name in {*here, *there} if here.get(name) != there.get(name))
    if not other:
        return Row("code", "", "the same")
    told = f"{len(other)} stages differ" if len(other) > 3 else ", ".join(other)
    problem = "results of these stages are not found: install this version of lora-workbench there"
    return Row("code", here.get(other[0], "")[:SHOWN], told, problem)


def _too_few(cluster: Cluster, there: Facts) -> str:
    if len(there.gpus) >= cluster.gpus:
        return ""
    return f"a unit asks for {cluster.gpus}: correct gpus in fleet.yaml, or the node's torch"


def _listed(gpus: Sequence[str]) -> str:
    return "; ".join(gpus) or "none"


def _seen(sees: bool) -> str:
    return "sees the other's file" if sees else "does not see it"
