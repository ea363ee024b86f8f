"""A unit: a `lora` command line in a folder of its own, and the process that runs an attempt at it.

unit.json       command, label, the project's folder, the cache
attempts.jsonl  a line per attempt: node, process, time, and how far the work was
exit.json       how it ended: it is there once no further attempt is to be made
log             what the command printed
stop            there once an engine without a queue was told to cancel it
runs/           the run folders of its command (LORA_WORK), with checkpoints and curves
"""

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Protocol

import msgspec

from pipeline.errors import AGAIN, NO_MEMORY, UserError
from pipeline.files.artifact import write_file
from pipeline.files.locks import is_running, process_state
from pipeline.project.entries import STORE
from pipeline.project.logs import run_state
from pipeline.project.logs.run_state import Journal
from pipeline.project.process import WORK
from pipeline.project.stage_graph import RUNS, Project

UNIT, ATTEMPTS, EXIT, LOG = "unit.json", "attempts.jsonl", "exit.json", "log"
BEFORE = "before"  # in a unit's folder: attempts before a user started it anew
STOP = "stop"  # in a unit's folder: its attempt is to end, on whichever machine it is
POLL = 1.0  # seconds between two looks at it
MOST_VAIN = 3  # attempts in a row without progress
CORES = "LORA_CORES"  # environment variable: the cores that an attempt may use
PR_SET_PDEATHSIG = 1
LONGEST = 100_000  # bytes of a log that are looked through for its error


@dataclass(frozen=True)
class Unit:
    """What a unit does. `command`: the arguments of `lora`; `label`: what it makes."""

    command: Sequence[str]
    label: str
    root: str  # the folder in which the command runs
    stage: str
    cache: str  # the cache's folder, which units without a store share
    nodes: int = 1  # machines that run the command together
    half_of: int = 0  # the unit whose half it is, which ran out of memory
    store: str = ""  # the DVC remote of machines that share no cache


@dataclass(frozen=True)
class Attempt:
    """A process that ran a unit; `done`: units of work before it."""

    node: str
    pid: int
    started: float
    done: int
    ticks: str = ""  # when the process started, by its machine: another may get its number

    @property
    def runs_here(self) -> bool:
        """Whether it is a process of this machine that has not ended."""
        return self.node == node_name() and is_running(self.pid, self.ticks)


class Job(Protocol):
    """The job of an engine in which an attempt runs."""

    def requeue(self) -> None:
        """Let the engine make another attempt, once this one has ended."""

    def together(self, command: Sequence[str], nodes: int) -> list[str]:
        """What runs a command on so many machines of the job."""

    def has_lost(self, printed: str) -> bool:
        """Whether what `together` printed tells that a machine was lost."""


@dataclass(frozen=True)
class Ended:
    """How a unit ended: 0, or an error's message."""

    code: int
    message: str = ""


def unit_of(
    project: Project,
    overrides: Sequence[str],
    command: Sequence[str],
    label: str,
    stage: str,
    nodes: int = 1,
) -> Unit:
    """The unit of a command on a project that was opened with `overrides`."""
    command = [*command, "--params", project.params.file]
    command += [f"--set={override}" for override in overrides]
    root, cache, store = str(project.root), str(project.cache.resolve()), os.environ.get(STORE, "")
    return Unit(command, label, root, stage, cache, nodes, store=store)


def write_unit(folder: Path, unit: Unit) -> None:
    """Make a unit's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / UNIT, json.dumps(asdict(unit), ensure_ascii=False, indent=1) + "\n")


def read_unit(folder: Path) -> Unit:
    """The unit in a folder. Raises UserError if there is none."""
    try:
        unit = msgspec.json.decode((folder / UNIT).read_bytes(), type=Unit)
        if Path(unit.stage).name != unit.stage:
            raise ValueError
        return unit
    except (OSError, ValueError):
        raise UserError(
            f"{folder / UNIT} is not a unit. Remove its run, and start it again."
        ) from None


def attempts(folder: Path) -> list[Attempt]:
    """A unit's attempts so far."""
    made = list[Attempt]()
    with suppress(OSError):
        for line in (folder / ATTEMPTS).read_bytes().splitlines():
            with suppress(ValueError):  # half of a line, of a killed process
                made.append(msgspec.json.decode(line, type=Attempt))
    return made


def ended(folder: Path) -> Ended | None:
    """How a unit ended; None if it has not."""
    with suppress(OSError, ValueError):
        return msgspec.json.decode((folder / EXIT).read_bytes(), type=Ended)
    return None


def begin_anew(folder: Path) -> None:
    """Forget how a unit ended or was stopped. Attempts before do not count as vain then."""
    endings = [path for path in (folder / EXIT, folder / STOP) if path.exists()]
    if endings:
        write_file(folder / BEFORE, str(len(attempts(folder))))
    for path in endings:
        path.unlink(missing_ok=True)


def journal(folder: Path, unit: Unit) -> Journal | None:
    """The journal of the unit's run; None before its first."""
    return run_state.read(journal_folder(folder, unit))


def journal_folder(folder: Path, unit: Unit) -> Path:
    """The folder of the unit's run."""
    return folder / RUNS / unit.stage


def attempt_command(folder: Path) -> list[str]:
    """The command line of a process that makes an attempt."""
    return [sys.executable, "-P", "-m", "lora_workbench", "fleet", "unit", str(folder)]


def node_name() -> str:
    """This machine, as its scheduler calls it."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def run_unit(folder: Path, job: Job | None = None) -> int:
    """Make an attempt at a unit; returns 0, the code of an error, or AGAIN.

    The job is put back into the queue for another attempt, unless SIGTERM, of a user or of an
    engine that will do so itself, ended this one.

    SIGTERM and SIGUSR1, an engine's warning before a time limit, reach the command as SIGTERM, as
    does a file STOP, and the end of the process that started this one: it writes a checkpoint and
    ends, and the next attempt goes on from there.
    """
    unit = read_unit(folder)
    if ended(folder) is not None:  # Slurm requeues jobs that it preempted once more at their end
        return 0
    seen = journal(folder, unit)
    earlier, done = attempts(folder), seen.done if seen else 0
    _, ticks = process_state(os.getpid())
    attempt = Attempt(node_name(), os.getpid(), time.time(), done, ticks)
    with (folder / ATTEMPTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(attempt)) + "\n")
    vain = earlier[_attempts_before(folder) :][-MOST_VAIN:]
    if len(vain) == MOST_VAIN and all(before.done == done for before in vain):
        nodes = ", ".join(before.node for before in vain)
        return end_unit(
            folder, 1, f"no progress in {MOST_VAIN} attempts ({nodes}). See {folder / LOG}."
        )
    command = [sys.executable, "-P", "-m", "lora_workbench", *unit.command]
    gang = job if unit.nodes > 1 else None
    if gang is not None:
        command = gang.together(command, unit.nodes)
    begin, kills = _size(folder / LOG), oom_kills()
    code, signals = _run(command, unit, folder)
    if code < 0 and oom_kills() > kills:
        return end_unit(folder, NO_MEMORY, f"out of memory on {attempt.node}")
    lost = gang is not None and gang.has_lost(_printed(folder, begin))
    if code in (0, 2, NO_MEMORY) or (code == 1 and not signals and not lost):
        return end_unit(folder, code, _error_of(folder) if code else "")
    if job is not None and signals.isdisjoint((signal.SIGTERM, signal.SIGINT)):
        job.requeue()
    return AGAIN


def _run(command: Sequence[str], unit: Unit, folder: Path) -> tuple[int, set[int]]:
    """The command's exit code, and the signals that asked it to stop."""
    environment = {**os.environ, WORK: str(folder)}
    if unit.store:
        environment[STORE] = unit.store
        environment.setdefault("LORA_CACHE", unit.cache)  # `setup` may name a disk of the machine
    else:
        environment["LORA_CACHE"] = unit.cache
    if cores := environment.get(CORES):
        os.sched_setaffinity(0, map(int, cores.split(",")))  # the command inherits it
    signals, children = set[int](), list[subprocess.Popen[bytes]]()
    parent = os.getppid()

    def stop(number: int, _frame: FrameType | None = None) -> None:
        signals.add(number)
        for child in children:
            child.send_signal(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, stop)
    with (folder / LOG).open("ab") as log:
        child = subprocess.Popen(
            command,
            cwd=unit.root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            preexec_fn=_end_with_unit,
        )
        children.append(child)
        if signals:  # before there was a child to pass them to
            child.send_signal(signal.SIGTERM)
        while True:
            with suppress(subprocess.TimeoutExpired):
                return child.wait(POLL), signals
            if not signals and (os.getppid() != parent or (folder / STOP).exists()):
                stop(signal.SIGTERM)


def _end_with_unit() -> None:
    """In the command: SIGTERM when its unit's process is killed. macOS has nothing like it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def end_unit(folder: Path, code: int, message: str = "") -> int:
    """Write how a unit ended; returns the code."""
    ending = asdict(Ended(code, message))
    write_file(folder / EXIT, json.dumps(ending) + "\n", durable=True)
    return code


def _attempts_before(folder: Path) -> int:
    """How many there were when a user last started the unit anew."""
    with suppress(OSError, ValueError):
        return int((folder / BEFORE).read_bytes())
    return 0


def oom_kills(root: Path = Path("/")) -> int:
    """Processes of this process's cgroup that the kernel killed for a lack of memory."""
    with suppress(OSError, ValueError, StopIteration):
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        group = next(line.removeprefix("0::/") for line in lines if line.startswith("0::/"))
        events = (root / "sys/fs/cgroup" / group / "memory.events").read_text(encoding="utf-8")
        return int(dict(line.split() for line in events.splitlines())["oom_kill"])
    return 0


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0


def _printed(folder: Path, begin: int = 0) -> str:
    """The end of what was printed since the log had `begin` bytes."""
    with (folder / LOG).open("rb") as file:
        file.seek(max(begin, file.seek(0, os.SEEK_END) - LONGEST))
        return file.read().decode(errors="replace")


def _error_of(folder: Path) -> str:
    """The last error that the command printed."""
    lines = _printed(folder).splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    return errors[-1].removeprefix("error: ") if errors else f"see {folder / LOG}"
