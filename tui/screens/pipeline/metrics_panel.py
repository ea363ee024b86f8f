"""Metrics compared with the last commit."""

from rich.table import Table
from rich.text import Text

from pipeline.project.logs.metrics_diff import Change


def metrics_table(changes: list[Change] | str) -> Table | Text:
    """A table of each changed metric: committed, now, difference. A string is shown as it is."""
    if isinstance(changes, str):
        return Text(changes, "dim")
    if not changes:
        return Text("As in the last commit.")
    rows = Table.grid(padding=(0, 2))
    for column, side in (("", "left"), ("committed", "right"), ("now", "right"), ("difference", "right")):
        rows.add_column(column, justify="right" if side == "right" else "left")
    rows.add_row("", Text("committed", "dim"), Text("now", "dim"), Text("difference", "dim"))
    for change in changes:
        both = change.before is not None and change.after is not None
        difference = f"{(change.after or 0) - (change.before or 0):+.4g}" if both else ""
        rows.add_row(
            change.name, *(f"{v:,.6g}" if v is not None else "–" for v in (change.before, change.after)), difference
        )
    return rows
