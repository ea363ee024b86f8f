"""What units do, by their files alone: for those who look on and do not ask an engine's queue."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from pipeline.files.text import counted
from pipeline.fleet.unit import Attempt, Unit, attempts, ended, journal, node_name, read_unit
from pipeline.project.logs import run_state
from pipeline.project.logs.run_state import Journal
from pipeline.project.stage_graph import RUNS

State = Literal["waiting", "queued", "running", "done", "failed", "stopped", "lost"]
URGENCY: Sequence[State] = (
    *("running", "failed", "lost", "stopped", "queued", "waiting", "done"),
)  # that of a run is the first that a unit has
ENDED = ("done", "failed")
STARTING = 60.0  # seconds that a process may take until its stage runs: it imports torch


@dataclass(frozen=True)
class UnitState:
    """What a unit does now."""

    number: int
    label: str
    state: State
    node: str = ""
    attempts: int = 0
    journal: Journal | None = None
    reason: str = ""  # the error, or why it waits
    code: int = 0  # exit code of one that failed
    stage: str = ""

    @property
    def is_whole(self) -> bool:
        """Whether it has made what its label says, and no halves in its place."""
        return self.state == "done" and not self.reason


class Fleet(NamedTuple):
    """A run and its units."""

    name: str
    stage: str
    cluster: str
    folder: Path
    when: float  # units were last started, in seconds since the epoch
    units: Sequence[UnitState]

    @property
    def state(self) -> State:
        """Of the unit that needs attention most."""
        states = {unit.state for unit in self.units}
        return next((state for state in URGENCY if state in states), "waiting")

    @property
    def journal(self) -> Journal:
        return joined(self.units)


def state_by_files(number: int, folder: Path) -> UnitState:
    """What a unit does. Raises UserError if its folder holds none.

    One that has stopped may be in the queue again, of which no file tells.
    """
    unit, made, ending = read_unit(folder), attempts(folder), ended(folder)
    seen, node = journal(folder, unit), made[-1].node if made else ""
    state: State = "waiting"
    reason, code = "", 0
    if ending is not None:
        code, reason = ending.code, ending.message
        state = "failed" if code else "done"
    elif made and _is_alive(folder, unit, made[-1]):
        state = "running"
    elif made:
        state = "stopped" if seen and seen.state == "stopped" else "lost"
    return UnitState(number, unit.label, state, node, len(made), seen, reason, code, unit.stage)


def _is_alive(folder: Path, unit: Unit, last: Attempt) -> bool:
    """Whether the attempt goes on: another machine's process is seen once its stage runs."""
    if run_state.alive(folder / RUNS / unit.stage):
        return True
    if last.node == node_name():
        return last.runs_here
    return time.time() - last.started < STARTING


def joined(units: Sequence[UnitState]) -> Journal:
    """One journal for all: steps done and in all, at the pace of the units that run.

    A unit that has not begun counts as many steps as the others have on average.
    """
    totals = [unit.journal.total for unit in units if unit.journal and unit.journal.total]
    mean = sum(totals) // len(totals) if totals else 0
    done = total = left = 0
    rate = slowest = 0.0
    for unit in units:
        seen = unit.journal
        steps = seen.total if seen and seen.total else mean
        made = seen.done if seen and unit.state != "done" else 0
        made = steps if unit.state == "done" else min(made, steps)
        total, done = total + steps, done + made
        left += 0 if unit.state in ENDED else steps - made
        if seen and unit.state == "running":
            rate += seen.rate
            slowest = max(slowest, seen.eta or 0.0)
    # the units share what is left, but the last of them alone may take longer
    seconds = max(left / rate, slowest) if rate else 0.0
    failed = next((unit for unit in units if unit.state == "failed"), None)
    message = f"unit {failed.number} ({failed.label}): {failed.reason}" if failed else ""
    count = sum(unit.state == "done" for unit in units)
    running = sum(unit.state == "running" for unit in units)
    return Journal(
        _journal_state(units),
        pid=0,
        started=0.0,
        done=done,
        total=total,
        text=f"{count} of {counted(len(units), 'unit')}{f', {running} running' * bool(running)}",
        message=message,
        rate=(total - done) / seconds if seconds else 0.0,
    )


def _journal_state(units: Sequence[UnitState]) -> run_state.State:
    states = {unit.state for unit in units}
    if states & {"running", "lost"}:
        return "running"
    if "failed" in states:
        return "failed"
    return "stopped" if states - {"done"} else "done"
