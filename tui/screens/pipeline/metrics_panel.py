"""Metrics against those of the last commit."""

from rich.table import Table
from rich.text import Text

from pipeline.project.logs.metrics_diff import Change


def table(changes: list[Change] | str) -> Table | Text:
    """Committed, now, difference."""
    if isinstance(changes, str):
        return Text(changes, "dim")
    if not changes:
        return Text("As in the last commit.")
    rows = Table.grid(padding=(0, 2))
    for column, side in (("", "left"), ("committed", "right"), ("now", "right"), ("difference", "right")):
        rows.add_column(column, justify="right" if side == "right" else "left")
    rows.add_row("", Text("committed", "dim"), Text("now", "dim"), Text("difference", "dim"))
    for one in changes:
        both = one.before is not None and one.after is not None
        difference = f"{(one.after or 0) - (one.before or 0):+.4g}" if both else ""
        rows.add_row(one.name, *(f"{v:,.6g}" if v is not None else "–" for v in (one.before, one.after)), difference)
    return rows
