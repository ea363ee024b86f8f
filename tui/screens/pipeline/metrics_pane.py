"""The pane of the numbers that an evaluation changed since the last commit."""

import asyncio
from collections.abc import Iterable
from pathlib import Path

from rich.table import Table
from rich.text import Text
from textual import work
from textual.containers import VerticalScroll
from textual.widget import Widget
from textual.widgets import Static

from pipeline.errors import UserError
from pipeline.evaluation.metrics_diff import MetricChange, metrics_since_commit
from pipeline.files.file_tail import file_stamp
from tui.widgets.pane import Pane


class MetricsPane(Pane):
    """Shows each number of metrics.json that differs from the committed one."""

    TITLE = "Metrics since the last commit"
    HELP = """\
Each number of `artifacts/evaluation/metrics.json` that differs from the one in the last git
commit, in six digits. What the numbers mean, and the models side by side, is on the screen
Results."""

    def __init__(self) -> None:
        super().__init__(id="metrics")
        self._stamps: object = None  # of the metrics and of git, when they were last compared

    def contents(self) -> Iterable[Widget]:
        with VerticalScroll():
            yield Static()

    def look(self, path: Path, root: Path) -> None:
        """Compare if the metrics or git's folder changed: git is a process."""
        stamps = file_stamp(path), file_stamp(root / ".git")
        if stamps != self._stamps:
            self._stamps = stamps
            self._compare(path)

    @work(group="metrics", exclusive=True)
    async def _compare(self, path: Path) -> None:
        try:
            shown = changes_table(await asyncio.to_thread(metrics_since_commit, path))
        except UserError as error:
            shown = Text(str(error))
        for widget in self.query(Static):  # none while the screen closes
            widget.update(shown)


def changes_table(changes: list[MetricChange]) -> Table | Text:
    """A table of each changed metric: committed, now, difference."""
    if not changes:
        return Text("As in the last commit.")
    rows = Table.grid(padding=(0, 2))
    rows.add_column()
    for _ in range(3):
        rows.add_column(justify="right")
    rows.add_row("", *(Text(title, "dim") for title in ("committed", "now", "difference")))
    for change in changes:
        both = change.before is not None and change.after is not None
        difference = (
            f"{(change.after or 0) - (change.before or 0):+.4g}".replace("-", "−") if both else ""
        )
        values = (
            f"{value:,.6g}" if value is not None else "–" for value in (change.before, change.after)
        )
        rows.add_row(change.name, *values, difference)
    return rows
