"""The tree of the stages: a table whose cursor follows the pipeline."""

from textual.content import Content

from pipeline.fleet.states import Fleet
from pipeline.views.stage_tree import GROUP, StageRow, short_name
from pipeline.views.stages import StageState
from tui.panes.table import Column, Table
from tui.screens.pipeline import fleet
from tui.screens.pipeline.stages import MUTED, look_of, progress
from tui.services.project_watch import ProjectWatch

ENDED = ("failed", "died", "stopped")  # states that name themselves
MAX_NAME = 26  # cells of a name with its lines


class StageTree(Table[StageRow]):
    """A row for each stage; the group is folded at first."""

    def __init__(self) -> None:
        super().__init__(
            key=lambda row: row.key,
            parent=lambda row: row.parent,
            columns=(
                Column("stage", lambda row: name_cell(row, GROUP in self.folded)),
                Column("what is to say", words_cell, width=7, fills=True),
                Column("last run", time_cell, right=True, rank=1),
            ),
            titles=False,
        )
        self.folded.add(GROUP)
        self._placed: str | None = None  # the row on which the program put the cursor
        # when the watch last told: whether something ran, which stage, which had failed
        self._before = False, "", set[str]()

    @property
    def stage(self) -> str:
        """The stage that the cursor is on; of the group the one that needs attention."""
        return self.pointed.stage if self.pointed else ""

    @property
    def fleet(self) -> Fleet | None:
        """The fleet's run that the cursor is on."""
        return self.pointed.fleet if self.pointed else None

    @property
    def _row_key(self) -> str | None:
        return self.pointed.key if self.pointed else None

    def place(self, stage: str) -> None:
        """Move the cursor to a stage, not as the user."""
        self.point(stage)
        self._placed = self._row_key

    def follow(self, watch: ProjectWatch, *, move: bool) -> None:
        """Move the cursor to a stage that began to run, or failed, unless the user moved it since
        the pipeline began.
        """
        running = watch.running.stage.name if watch.running else ""
        failed = {name for name, state in watch.states.items() if state.state in ("failed", "died")}
        was_busy, was_running, had_failed = self._before
        is_busy = bool(running or watch.pipeline)
        self._before = is_busy, running, failed
        if is_busy and not was_busy:
            self._placed = self._row_key
        target = running if running != was_running else ""
        if was_busy and not target:
            target = next(iter(failed - had_failed), "")
        if target and move and self._row_key == self._placed:
            self.place(target)

    def fold_group(self) -> None:
        """Fold or unfold the group, if the cursor is in it."""
        row = self.pointed
        if row and GROUP in (row.key, row.parent):
            self.fold(GROUP, GROUP not in self.folded)


def name_cell(row: StageRow, folded: bool) -> Content:
    sign, style = fleet.LOOKS[row.fleet.state] if row.fleet else look_of(row.state)
    mark = ""
    if row.members:
        mark = "▸ " if folded else "▾ "
    line = Content.assemble((f"{sign} ", style), (row.guides, MUTED), mark, row.label)
    return line.truncate(MAX_NAME, ellipsis=True)


def words_cell(row: StageRow) -> Content:
    """Progress, why the state is as it is, or what else the stage needs."""
    state = row.state
    if row.fleet:
        return fleet.words(row.fleet)
    if state is None:
        return Content.styled("…", MUTED)
    if row.members:
        return _group_words(row, state)
    style, reasons = look_of(state)[1], ", ".join(state.reasons)
    needs = f"after {', '.join(row.after)}" if row.after else ""
    match state.state:
        case "running":
            return progress(state.run)
        case "failed" | "died" | "stopped":
            return Content.assemble((state.state, style), f": {reasons}" if reasons else "")
        case "changed" | "current" if reasons:  # of an evaluation: whether limits are kept
            return Content.styled(reasons, style)
        case "missing" if reasons and not reasons.startswith("needs "):  # which the tree shows
            return Content.styled(f"not made: {reasons}", MUTED)
        case "missing":
            needs = ", ".join(filter(None, ("not made", needs)))
        case "waits":
            needs = ", ".join(filter(None, ("waits", needs)))
    return Content.styled(needs, MUTED)


def _group_words(row: StageRow, state: StageState) -> Content:
    """How many members are up to date, and the one that needs attention."""
    done = sum(bool(each and each.state == "current") for each in row.members)
    text = Content.styled(f"{done}/{len(row.members)}", MUTED)
    if state.state != "running" and state.state not in ENDED:
        return text
    sign, style = look_of(state)
    text += Content.styled(f"  {sign} {short_name(state.stage)} ", style)
    return text + progress(state.run) if state.state == "running" else text


def time_cell(row: StageRow) -> Content:
    run = row.state.run if row.state and not row.fleet else None
    seconds = run.seconds if run and not row.members else None
    return Content.styled("" if seconds is None else brief(seconds), MUTED)


def brief(seconds: float) -> str:
    """A time in at most five cells: <1 s, 4 s, 2:05, 3h20."""
    total = round(seconds)
    if total < 60:
        return f"{total} s" if total else "<1 s"
    if total < 3600:
        return f"{total // 60}:{total % 60:02}"
    return f"{total // 3600}h{total % 3600 // 60:02}"
