"""The DAG as a tree: each stage below the one that it needs, those of a group together; what its row
says.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from textual.content import Content

from pipeline.project.stage_graph import Stage
from pipeline.views.stages import StageState, State
from tui.widgets.text import duration, pad_or_truncate

GROUP = "(group)"  # the key of the group, which is no stage's name
MUTED = "$foreground-muted"
SIGNS: Mapping[State, tuple[str, str]] = {
    "missing": ("○", MUTED),
    "current": ("✓", "$text-success"),
    "changed": ("●", "$text-warning"),
    "waits": ("◌", MUTED),
    "running": ("▶", "bold $text-accent"),
    "failed": ("✗", "bold $text-error"),
    "stopped": ("‖", "$text-warning"),
    "died": ("✗", "bold $text-error"),
}
URGENCY: Sequence[State] = (
    "running",
    "died",
    "failed",
    "stopped",
    "changed",
    "waits",
    "missing",
    "current",
)
BROKEN = SIGNS["failed"]  # of an evaluation whose models break evaluate.limits
WORDS: Mapping[State, str] = {"missing": "not made", "waits": "waits"}
BAR, MIN_BAR = 8, 3  # cells of a progress bar


@dataclass(frozen=True)
class Row:
    """A line of the tree: a stage, or the group. `after`: further stages that it
    needs.
    """

    key: str
    guides: str
    label: str
    after: tuple[str, ...] = ()
    members: tuple[str, ...] = ()  # of the group


def look_of(state: StageState | None) -> tuple[str, str]:
    """The sign of a state and its style; a dot while none is known."""
    if state is None:
        return "·", MUTED
    return BROKEN if state.broken else SIGNS[state.state]


def short_name(stage: Stage) -> str:
    """lora for finetune_lora, rank for study_rank; the names that others have are kept."""
    return stage.method if stage.look or stage.group else stage.name


def tree_rows(
    stages: Mapping[str, Stage], needs: Mapping[str, Sequence[str]], unfolded: bool
) -> list[Row]:
    """The rows from top to bottom. `needs`: stage → the stages that it reads, in the DAG's
    order.
    """
    above: dict[str, set[str]] = {}  # stage → all that it needs, directly or not
    parents: dict[str, str] = {}
    after: dict[str, tuple[str, ...]] = {}
    for name in stages:
        direct = [need for need in needs[name] if need in above]
        above[name] = set(direct).union(*(above[need] for need in direct))
        implied = set[str]().union(*(above[need] for need in direct))
        last = [need for need in direct if need not in implied]
        shared = set.intersection(*({need, *above[need]} for need in last)) if last else set[str]()
        parents[name] = max(shared, key=lambda need: len(above[need]), default="")
        after[name] = tuple(need for need in last if need != parents[name])
    members = tuple(name for name, stage in stages.items() if stage.group)
    label = stages[members[0]].group if members else ""
    if len(members) > 1:
        shared = set.intersection(*(above[name] for name in members))
        parents |= dict.fromkeys(members, GROUP)
        parents[GROUP] = max(shared, key=lambda need: len(above[need]), default="")
        for (
            name
        ) in stages:  # what needs one of them alone is no part of the group, which would hide it
            if parents[name] in members:
                parents[name], after[name] = parents[GROUP], (parents[name], *after[name])
    else:
        members = ()
    children: dict[str, list[str]] = {}
    for name in stages:
        if parents[name] == GROUP and GROUP not in children:
            children.setdefault(parents[GROUP], []).append(GROUP)
        children.setdefault(parents[name], []).append(name)
    rows: list[Row] = []

    def add(names: Sequence[str], guides: str) -> None:
        for number, name in enumerate(names):
            is_last = number == len(names) - 1
            branch = f"{guides}{'└ ' if is_last else '├ '}" if parents[name] else ""
            below = f"{guides}{'  ' if is_last else '│ '}" if parents[name] else ""
            if name == GROUP:
                rows.append(
                    Row(name, branch, f"{'▾' if unfolded else '▸'} {label}", members=members)
                )
            else:
                others = [need for need in after[name] if not (members and stages[need].group)]
                named = [short_name(stages[need]) for need in others] + [label] * (
                    len(others) < len(after[name])
                )
                rows.append(Row(name, branch, short_name(stages[name]), tuple(named)))
            if name != GROUP or unfolded:
                add(children.get(name, []), below)

    add(children.get("", []), "")
    return rows


def group_state(members: Iterable[str], states: Mapping[str, StageState]) -> StageState | None:
    """The state of the member that needs most attention; None while none is known."""
    known = [states[name] for name in members if name in states]
    return min(known, key=lambda state: URGENCY.index(state.state), default=None)


def draw_rows(
    rows: Sequence[Row], states: Mapping[str, StageState], width: int
) -> dict[str, Content]:
    """A line of `width` cells for each row: sign, name, what is to say of it, and the time that its
    last run took.
    """
    names = min(
        max((cell_len(row.guides + row.label) for row in rows), default=0), max(12, width * 6 // 10)
    )
    return {row.key: _draw_row(row, states, names, width) for row in rows}


def _draw_row(row: Row, states: Mapping[str, StageState], names: int, width: int) -> Content:
    state = group_state(row.members, states) if row.members else states.get(row.key)
    label = pad_or_truncate(row.label, max(1, names - cell_len(row.guides)))
    sign, style = look_of(state)
    line = Content.assemble((f"{sign} ", style), (row.guides, MUTED), label)
    took, room = _took(row, state), width - line.cell_length - 2
    if room < 4:
        return line
    text = _describe(row, state, states, room)
    # what is to say matters more than how long it took
    if took and text.cell_length + len(took) + 2 <= room:
        text = text.truncate(room - len(took), pad=True) + Content.styled(took, MUTED)
    return Content.assemble(line, "  ", text.truncate(room, ellipsis=True))


def _took(row: Row, state: StageState | None) -> str:
    seconds = (
        state.run.seconds
        if state and state.run and not row.members and state.state != "running"
        else None
    )
    return "" if seconds is None else f"{brief(seconds):>5}"


def _describe(
    row: Row, state: StageState | None, states: Mapping[str, StageState], room: int
) -> Content:
    """What is to say of a row in about `room` cells: progress, why its state is as it is, or what
    else it needs.
    """
    if state is None:
        return Content.styled("…", MUTED)
    style, reasons = look_of(state)[1], ", ".join(state.reasons)
    if row.members:
        known = [states[name] for name in row.members if name in states]
        text = Content.styled(
            f"{sum(one.state == 'current' for one in known)}/{len(row.members)}", MUTED
        )
        if state.state in ("running", "died", "failed", "stopped"):
            text += Content.styled(f"  {SIGNS[state.state][0]} {short_name(state.stage)} ", style)
        return text + progress(state, room - text.cell_length) if state.state == "running" else text
    if state.state == "running":
        return progress(state, room)
    if state.state in ("failed", "died", "stopped"):
        return Content.assemble((state.state, style), f": {reasons}" if reasons else "")
    if state.state == "changed":
        return Content.styled(reasons, style)
    if state.state == "current" and reasons:  # of an evaluation: whether its limits are kept
        return Content.styled(reasons, style)
    words = WORDS.get(state.state, "")
    # the tree shows what it needs
    if state.state == "missing" and reasons and not reasons.startswith("needs "):
        return Content.styled(f"{words}: {reasons}", MUTED)
    for after in (", ".join(row.after), f"{len(row.after)} others"):
        line = ", ".join(filter(None, (words, f"after {after}" if row.after else "")))
        if cell_len(line) <= room:
            return Content.styled(line, MUTED)
    return Content.styled(words, MUTED)


def progress(state: StageState, room: int) -> Content:
    """━━━━━╌╌╌  64%  12 s left, as much of it as there is room for."""
    run, style = state.run, SIGNS["running"][1]
    if run is None or not run.total:
        return Content.styled("starting", style)
    share = min(1.0, run.done / run.total)
    text, bar = Content(""), min(BAR, room - 5)
    if bar >= MIN_BAR:
        filled = round(share * bar)
        text = Content.assemble(("━" * filled, style), ("╌" * (bar - filled) + " ", MUTED))
    text += Content.styled(f"{share:4.0%}", style)
    left = "" if run.eta is None else f"  {duration(run.eta)} left"
    return (
        text + Content.styled(left, style)
        if left and text.cell_length + len(left) <= room
        else text
    )


def brief(seconds: float) -> str:
    """A time in at most five cells: <1 s, 4 s, 2:05, 3h20."""
    total = round(seconds)
    if total < 1:
        return "<1 s"
    if total < 60:
        return f"{total} s"
    return (
        f"{total // 60}:{total % 60:02}"
        if total < 3600
        else f"{total // 3600}h{total % 3600 // 60:02}"
    )
