"""The pane of the log: of a stage, or of all that the pipeline printed."""

from collections.abc import Iterator, Sequence
from functools import lru_cache

from textual import on
from textual.content import Content

from pipeline.views.stage_logs import MAX_LINES, StageLog
from pipeline.views.stages import StageState
from tui.panes.pane import Pane
from tui.panes.text import Text
from tui.screens.pipeline.about import LOG

EMPTY = "Nothing was printed: the pipeline has not run this stage since its log began."
ERRORS = ("error", "traceback", "✗")  # what a line of a failure begins with


class LogPane(Pane):
    """Shows a log, whose lines depend on the width, with its place in a search."""

    def __init__(self) -> None:
        self.text = Text(follow=True)
        super().__init__(LOG, self.text, id="log")
        self.shown = StageLog()
        self._state: StageState | None = None

    def show(self, log: StageLog, state: StageState | None) -> None:
        """Show a log; what was read of another is left."""
        again = log.stage == self.shown.stage
        self.shown, self._state = log, state
        self.text.show(self._draw, again=again)
        self._show_facts()

    def lines(self, width: int) -> Sequence[str]:
        return self.shown.lines(self._state, width)

    def _draw(self, width: int) -> Iterator[Content]:
        return map(styled, self.lines(width) or [EMPTY])

    @on(Text.Moved)
    def _show_facts(self) -> None:
        text, facts = self.text, []
        if text.needle:
            matches = text.matches
            at = matches.index(text.found) + 1 if text.found in matches else 0
            facts.append(f"{at} of {len(matches)}")
        if text.follows:
            facts.append("following")
        self.show_title(*facts, title=f"Log of {self.shown.stage or 'all stages'}")

    def action_follow(self) -> None:
        self.text.follows = not self.text.follows

    def action_copy(self) -> None:
        lines = self.lines(self.text.width)
        self.app.copy_to_clipboard("\n".join(lines))
        self.notify(f"{len(lines):,} lines copied.")


@lru_cache(maxsize=2 * MAX_LINES)  # a log that grows is drawn twice a second
def styled(line: str) -> Content:
    """A line of a log: red what tells of an error, grey what was run and noted."""
    start, style = line.lstrip().casefold(), ""
    if start.startswith(ERRORS):
        style = "$text-error"
    elif start.startswith((">", "…")):
        style = "$foreground-muted"
    return Content.styled(line, style)
