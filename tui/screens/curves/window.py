"""What is visible of the runs: the range of steps and values, the scale, the step cursor."""

from dataclasses import dataclass, replace

from tui.screens.curves.selection import Runs
from tui.widgets.plot.scale import Range


@dataclass(frozen=True)
class Window:
    """`x` None: all steps; `y` None: all values; `log` None: where a decade is spanned.

    `following`: `x` moves with the newest step.
    """

    x: Range | None = None
    y: Range | None = None
    log: bool | None = None
    following: bool = False
    cursor: float | None = None

    def steps(self, runs: Runs) -> Range:
        """The visible steps: all, the window's, or as many up to the newest step."""
        steps = [log.steps for _, view in runs.visible() for log in view.logs if log.steps]
        first, last = (min(s[0] for s in steps), max(s[-1] for s in steps)) if steps else (0.0, 1.0)
        if self.x is None:
            return (first, last) if first < last else (first - 1, last + 1)
        return (last - (self.x[1] - self.x[0]), last) if self.following else self.x

    def sideways(self, direction: int, steps: Range, columns: int, start: float) -> "Window":
        """With the cursor a column further, at least a step; at first it is at `start`."""
        first, last = steps
        if self.cursor is None:
            return replace(self, cursor=round(min(max(start, first), last)))
        by = max(round((last - first) / columns), 1)
        return replace(
            self, cursor=min(max(self.cursor + by * direction, round(first)), round(last))
        )

    def facts(self, steps: Range) -> list[str]:
        """Cursor and steps in words."""
        first, last = steps
        at = [f"at step {self.cursor:,.0f}"] if self.cursor is not None else []
        if self.x is None:
            return [*at, "all steps"]
        return [
            *at,
            f"last {last - first:,.0f} steps"
            if self.following
            else f"steps {first:,.0f} to {last:,.0f}",
        ]
