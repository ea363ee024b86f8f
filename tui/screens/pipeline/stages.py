"""What is shown of a stage: its sign, and what is to say of it."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime

from textual.content import Content

from pipeline.project.logs.run_state import Journal
from pipeline.views.stage_tree import URGENCY
from pipeline.views.stages import StageState, State
from tui.panes.plot.plot import sparkline
from tui.services.pipeline_process import Running
from tui.widgets.cells import duration

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
STATES = {"current": "up to date", "missing": "not made yet", "waits": "will run again"}
NEXT = {  # what to press
    "missing": "R runs all stages, S this one alone.",
    "changed": "R runs what changed, S this alone.",
    "stopped": "S or R resumes from its checkpoint.",
    "failed": "Mend what it says, then S runs it again.",
    "died": "S or R resumes from its last checkpoint.",
}
CURVE = 24  # cells of the losses
BAR = 8  # cells of a progress bar
LABEL = 5  # cells of the labels of facts

Fact = tuple[str, str, str]  # label, text, style


def look_of(state: StageState | None) -> tuple[str, str]:
    """The sign of a state and its style; a dot while none is known."""
    if state is None:
        return "·", MUTED
    # an evaluation whose models break evaluate.limits
    return SIGNS["failed" if state.broken else state.state]


def counts(states: Iterable[StageState]) -> Content:
    """`1 ✗ 10 ✓`: how many stages are in which state."""
    looks = Counter(map(look_of, states))
    parts = []
    for look in dict.fromkeys(SIGNS[state] for state in URGENCY):  # two states have one sign
        if looks[look]:
            parts.append(Content.styled(f"{looks[look]} {look[0]}", look[1]))
    return Content(" ").join(parts)


def progress(run: Journal | None) -> Content:
    """`64% ━━━━━╌╌╌ 12 s left`: what matters most comes first, as a narrow pane cuts the rest."""
    style = SIGNS["running"][1]
    if run is None or not run.total:
        return Content.styled("starting", style)
    share = min(1.0, run.done / run.total)
    filled = round(share * BAR)
    left = "" if run.eta is None else f" {duration(run.eta)} left"
    bar = ("━" * filled, style), ("╌" * (BAR - filled), MUTED)
    return Content.assemble((f"{share:.0%} ", style), *bar, (left, style))


# Facts


def headline(state: StageState | None) -> Content:
    """The state, and of a run its progress."""
    if state is None:
        return Content.styled("…", MUTED)
    sign, style = look_of(state)
    words = STATES.get(state.state, state.state)
    if state.broken:
        words = "breaks evaluate.limits"
    run = state.run
    if state.state == "running" and run and run.total:
        left = "" if run.eta is None else f"  {duration(run.eta)} left"
        words = f"{run.done / run.total:.0%}{left}  {run.done:,}/{run.total:,}"
    return Content.styled(f"{sign} {words}", style)


def facts(state: StageState, running: Running | None, losses: Sequence[float]) -> Iterator[Fact]:
    """What is to say of a stage, the most important first."""
    run, is_running = state.run, state.state == "running"
    is_wrong = state.broken or state.state in ("failed", "died", "changed")
    style = look_of(state)[1] if is_wrong else ""
    reasons = [*state.reasons, *(state.broken.reasons if state.broken else ())]
    if run and run.message and run.message not in reasons and not is_running:
        reasons.append(f"its last run: {run.message}")
    for reason in reasons:
        yield "why", reason, style
    if state.broken:
        yield "next", state.broken.next_step, MUTED
    if state.state in NEXT:
        yield "next", NEXT[state.state], MUTED
    if losses:
        yield "loss", f"{sparkline(losses, CURVE).strip()} {losses[-1]:.4g}", ""
    if run:
        yield "run", _started(run, running) if is_running else _ended(run), ""
        for note in run.notes:
            yield "note", note.removeprefix(f"{state.stage.name}: "), MUTED


def _started(run: Journal, running: Running | None) -> str:
    """Who started a run, and when. `running`: the pipeline that a workbench started."""
    if running is None:
        who = "in a terminal or by another program:"
    elif running.starter == os.getpid():
        who = f"here as {running.command},"
    else:
        who = f"by another workbench, process {running.starter}, as {running.command},"
    process = running or run
    since = datetime.fromtimestamp(process.started)
    return f"{who} {process.process}, since {since:%H:%M:%S}"


def _ended(run: Journal) -> str:
    took = "" if run.seconds is None else f" in {duration(run.seconds)}"
    verb = "ended" if run.ended else "started"
    return (
        f"{run.state}{took}, {verb} {datetime.fromtimestamp(run.ended or run.started):%d %b %H:%M}"
    )


def draw_facts(rows: Iterable[Fact], width: int) -> Iterator[Content]:
    """Each fact below its label, which is written once."""
    before = ""
    for label, text, style in rows:
        for part in Content.styled(text, style).wrap(max(width - LABEL, 10)):
            yield Content.assemble(("" if label == before else label).ljust(LABEL), part)
            before = label
