"""The numbers that an evaluation changed since the last commit."""

import asyncio
from pathlib import Path

from textual import work

from pipeline.errors import UserError
from pipeline.evaluation.metrics_diff import MetricChange, metrics_since_commit
from pipeline.files.file_tail import file_stamp
from tui.panes.table import Column, Table


class Metrics(Table[MetricChange]):
    """A row for each number that is another than the committed one."""

    def __init__(self) -> None:
        super().__init__(
            key=lambda change: change.name,
            columns=(
                Column("metric", lambda change: change.name),
                Column("committed", lambda change: _six_digits(change.before), right=True),
                Column("now", lambda change: _six_digits(change.after), right=True),
                Column("difference", _difference, right=True),
            ),
        )
        self._stamps: object = None  # of the metrics and of git, when they were last compared

    def look(self, path: Path, root: Path) -> None:
        """Compare if the metrics or git's folder changed: git is a process."""
        stamps = file_stamp(path), file_stamp(root / ".git")
        if stamps != self._stamps:
            self._stamps = stamps
            self._compare(path)

    @work(exclusive=True)
    async def _compare(self, path: Path) -> None:
        try:
            changes = await asyncio.to_thread(metrics_since_commit, path)
            self.nothing = "As in the last commit."
        except UserError as error:
            changes, self.nothing = [], str(error)
        self.show(changes)


def _difference(change: MetricChange) -> str:
    if change.before is None or change.after is None:
        return ""
    return f"{change.after - change.before:+.4g}".replace("-", "−")


def _six_digits(value: float | None) -> str:
    return "–" if value is None else f"{value:,.6g}"
