"""What is shown of a fleet's run: its row in the tree, what is to say of it, a table of its units."""

from collections.abc import Iterator, Mapping
from typing import Any

from textual.content import Content

from pipeline.fleet.states import Fleet, State, UnitState
from pipeline.views.stages import StageState
from tui.panes.table import Column, Table
from tui.screens.pipeline.stages import MUTED, SIGNS, Fact, progress
from tui.widgets.cells import duration

LOOKS: Mapping[State, tuple[str, str]] = {
    "running": SIGNS["running"],
    "failed": SIGNS["failed"],
    "lost": SIGNS["died"],
    "stopped": SIGNS["stopped"],
    "queued": SIGNS["waits"],
    "waiting": SIGNS["waits"],
    "done": SIGNS["current"],
}
NEXT: Mapping[State, str] = {  # what to type
    "running": "`lora fleet cancel {0}` stops its units; each keeps its last checkpoint.",
    "failed": "`lora fleet retry {0}` starts them again.",
    "lost": "`lora fleet` asks the queue for them, `lora fleet retry {0}` starts them again.",
    "stopped": "`lora fleet` asks the queue for them, `lora fleet retry {0}` starts them again.",
    "waiting": "`lora fleet` asks the queue why they wait.",
}
MOST_REASONS = 3
LONGEST = 300  # characters of a reason


def is_shown(fleet: Fleet, state: StageState | None) -> bool:
    """Whether it goes on, or is to be mended: its stage has not run since."""
    ended = state.run.ended if state and state.run else 0.0
    return fleet.state == "running" or (fleet.state != "done" and ended < fleet.when)


def words(fleet: Fleet) -> Content:
    """`1/4 64% ━━━━━╌╌╌ 12 s left`, or what it waits for."""
    done = sum(unit.state == "done" for unit in fleet.units)
    count = Content.styled(f"{done}/{len(fleet.units)} ", MUTED)
    if fleet.state == "running":
        return count + progress(fleet.journal)
    return count + Content.styled(fleet.state, LOOKS[fleet.state][1])


def headline(fleet: Fleet) -> Content:
    """The state, and the progress of all units."""
    (sign, style), journal = LOOKS[fleet.state], fleet.journal
    text: str = fleet.state
    if fleet.state == "running" and journal.total:
        left = "" if journal.eta is None else f"  {duration(journal.eta)} left"
        text = f"{journal.done / journal.total:.0%}{left}  {journal.done:,}/{journal.total:,}"
    return Content.styled(f"{sign} {text}", style)


def facts(fleet: Fleet) -> Iterator[Fact]:
    """What is to say of a run, the most important first."""
    failed = [unit for unit in fleet.units if unit.state == "failed"]
    for unit in failed[:MOST_REASONS]:
        yield (
            "why",
            f"unit {unit.number} on {unit.node}: {unit.reason[:LONGEST]}",
            SIGNS["failed"][1],
        )
    if len(failed) > MOST_REASONS:
        yield "why", f"and {len(failed) - MOST_REASONS} others", SIGNS["failed"][1]
    yield "run", f"{fleet.name} on {fleet.cluster}: {fleet.journal.text}", ""
    if fleet.state in NEXT:
        yield "next", NEXT[fleet.state].format(fleet.name), MUTED


class UnitTable(Table[UnitState]):
    """A row for each unit of a run."""

    def __init__(self) -> None:
        super().__init__(
            key=lambda unit: unit.number,
            columns=(
                Column("unit", lambda unit: Content(str(unit.number)), _number, right=True),
                Column("state", _state, lambda unit: unit.state),
                Column("node", lambda unit: Content(unit.node), lambda unit: unit.node, rank=1),
                Column("tries", _tries, lambda unit: unit.attempts, right=True, rank=3),
                Column("step", _step, lambda unit: unit.journal and unit.journal.done, right=True),
                Column("left", _left, right=True, rank=2),
                Column("makes", _makes, width=8, fills=True),
            ),
        )


def _number(unit: UnitState) -> Any:
    return unit.number


def _state(unit: UnitState) -> Content:
    sign, style = LOOKS[unit.state]
    return Content.styled(f"{sign} {unit.state}", style)


def _tries(unit: UnitState) -> Content:
    return Content(str(unit.attempts))


def _step(unit: UnitState) -> Content:
    journal = unit.journal
    return Content(f"{journal.done:,}/{journal.total:,}" if journal and journal.total else "")


def _left(unit: UnitState) -> Content:
    eta = unit.journal.eta if unit.journal and unit.state == "running" else None
    return Content("" if eta is None else duration(eta))


def _makes(unit: UnitState) -> Content:
    """The label; of one that failed the reason, which says more."""
    if unit.reason:
        return Content.assemble(unit.label, (f"  {unit.reason[:LONGEST]}", MUTED))
    return Content(unit.label)
