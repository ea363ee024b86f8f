"""What is to say of the stage that the cursor is on: progress, why its state is as it is, its runs,
what to press.
"""

import os
from collections.abc import Iterable, Sequence
from datetime import datetime

from textual.content import Content
from textual.events import Resize
from textual.widget import Widget
from textual.widgets import Static

from pipeline.views.stages import StageState
from tui.screens.pipeline.tree import MUTED, look_of
from tui.services.pipeline_process import Running
from tui.widgets.pane import Pane
from tui.widgets.plot.sparkline import sparkline
from tui.widgets.text import duration

STATES = {"current": "up to date", "missing": "not made yet", "waits": "will run again"}
BROKEN = "breaks evaluate.limits"  # in place of up to date
LABEL = 5  # cells of the labels
CURVE = 24  # cells of the losses
NEXT = {  # what to press
    "missing": "R runs all stages, S this one alone.",
    "changed": "R runs what changed, S this alone.",
    "stopped": "S or R resumes from its checkpoint.",
    "failed": "Mend what it says, then S runs it again.",
    "died": "S or R resumes from its last checkpoint.",
}
Fact = tuple[str, str, str]  # label, text, style


def describe_starter(running: Running | None, state: StageState) -> str:
    """Who started the run, and when."""
    if running is None:
        run = state.run
        return (
            f"in a terminal or by another program: process {run.pid}, {_since(run.started)}"
            if run
            else ""
        )
    mine = running.starter == os.getpid()
    who = (
        "here"
        if mine
        else f"by another workbench, process {running.starter},"
        if running.starter
        else "by a workbench"
    )
    return f"{who} as {running.command}, process {running.pid}, {_since(running.started)}"


def _since(moment: float) -> str:
    return f"since {datetime.fromtimestamp(moment):%H:%M:%S}"


def headline(state: StageState | None) -> Content:
    """The state, and of a run its progress."""
    if state is None:
        return Content.styled("…", MUTED)
    sign, style = look_of(state)
    text, run = (
        f"{sign} {BROKEN if state.broken else STATES.get(state.state, state.state)}",
        state.run,
    )
    if state.state == "running" and run and run.total:
        left = "" if run.eta is None else f"  {duration(run.eta)} left"
        text = f"{sign} {run.done / run.total:.0%}{left}  {run.done:,}/{run.total:,}"
    return Content.styled(text, style)


def facts_of(state: StageState, running: Running | None, losses: Sequence[float]) -> list[Fact]:
    """What is to say of a stage, the most important first."""
    run, rows = state.run, list[Fact]()
    style = (
        look_of(state)[1] if state.broken or state.state in ("failed", "died", "changed") else ""
    )
    reasons = [*state.reasons, *(state.broken.reasons if state.broken else ())]
    if run and run.message and run.message not in reasons and state.state != "running":
        reasons.append(f"its last run: {run.message}")
    rows += [("why", reason, style) for reason in reasons[:1]] + [
        ("", reason, style) for reason in reasons[1:]
    ]
    if state.broken:
        rows.append(("next", state.broken.next_step, MUTED))
    if state.state in NEXT:
        rows.append(("next", NEXT[state.state], MUTED))
    if losses:
        rows.append(("loss", f"{sparkline(losses, CURVE).strip()} {losses[-1]:.4g}", ""))
    if state.state == "running":
        rows.append(("run", describe_starter(running, state), ""))
    elif run:
        took = "" if run.seconds is None else f" in {duration(run.seconds)}"
        ended = datetime.fromtimestamp(run.ended or run.started)
        rows.append(
            (
                "run",
                f"{run.state}{took}, {'ended' if run.ended else 'started'} {ended:%d %b %H:%M}",
                "",
            )
        )
    name = f"{state.stage.name}: "
    notes = [note.removeprefix(name) for note in (run.notes if run else ())]
    rows += [("" if number else "note", note, MUTED) for number, note in enumerate(notes)]
    return [row for row in rows if row[1]]


class FactsPane(Pane):
    """A few lines on one stage. It has no cursor, so it never has the focus."""

    HELP = (
        "The state of the stage that the cursor is on, why it is so, who runs it, and notes of "
        "its last run."
    )
    ALLOW_MAXIMIZE = False

    def __init__(self) -> None:
        super().__init__(id="facts")
        self.headline = ""
        self.facts: list[Fact] = []
        self._height = 0

    def contents(self) -> Iterable[Widget]:
        yield Static(markup=False)

    def show(
        self, name: str, state: StageState | None, running: Running | None, losses: Sequence[float]
    ) -> None:
        """Show what is to say of a stage."""
        title = Content.assemble((name, "bold"), "  ", headline(state))
        self.border_title, self.headline = title, title.plain
        self.facts = facts_of(state, running, losses) if state else []
        self._draw()

    def on_resize(self, event: Resize) -> None:
        super().on_resize(event)
        self._draw()

    def _draw(self) -> None:
        lines = []
        for label, text, style in self.facts:
            parts = Content.styled(text, style).wrap(max(self.size.width - LABEL, 10))
            lines += [
                Content.assemble(("" if n else label).ljust(LABEL), part)
                for n, part in enumerate(parts)
            ]
        self.query_one(Static).update(Content("\n").join(lines), layout=len(lines) != self._height)
        self._height = len(lines)
