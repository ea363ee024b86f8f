"""Series over time, one below the other, coloured by load, with the predicted level."""

import math
from collections.abc import Sequence
from itertools import groupby

from textual.app import RenderResult
from textual.content import Content
from textual.widget import Widget

from pipeline.files.text import in_units
from tui.screens.monitor.series import Series, columns
from tui.widgets.colors import share_style
from tui.widgets.plot.sparkline import area
from tui.widgets.text import pad_or_truncate

LABEL, FACTS = 16, 22  # cells of the outer columns
MAX_ROWS = 14  # of a series
LEVEL = "╌"
NOTHING = "·"  # in the lowest row, where nothing was read


class Charts(Widget):
    """Draws the series of the last `seconds` before `end`, as high as there is room."""

    ALLOW_SELECT = False  # selectable text takes a quarter more time to draw

    DEFAULT_CSS = """
    Charts { height: 1fr; width: 1fr; }
    """

    def __init__(self) -> None:
        super().__init__()
        self._series: Sequence[Series] = ()
        self._end, self._seconds = 0.0, 1.0

    def show(self, series: Sequence[Series], end: float, seconds: float) -> None:
        if len(series) != len(self._series):
            self.styles.min_height = len(series)  # more do not fit: the pane scrolls
        self._series, self._end, self._seconds = series, end, seconds
        self.refresh()

    def render(self) -> RenderResult:
        return self.content

    @property
    def content(self) -> Content:
        width, height = self.size
        if not self._series or width < LABEL + 12:
            return Content()
        spaced = height // len(self._series) > 2  # an empty line between two
        rows = min(max(height // len(self._series) - spaced, 1), MAX_ROWS)
        lines = list[Content]()
        for one in self._series:
            lines += draw(one, self._end, self._seconds, width, rows)
            lines += [Content()] * spaced
        return Content("\n").join(lines)


def draw(series: Series, end: float, seconds: float, width: int, rows: int) -> list[Content]:
    """A series in `rows` lines: label, chart, facts; the level is a dashed line with its value."""
    facts_width = min(FACTS, max(width // 3, 10))
    chart_width = max(width - LABEL - facts_width - 2, 1)
    # The end of a column, so that a value stays in its column and the chart moves once a column.
    end = math.ceil(end / seconds * chart_width) * seconds / chart_width
    values = columns(series.values, end, seconds, chart_width)
    filled = area(values, chart_width, rows, 0, series.high)
    styles = [
        "$foreground 25%" if math.isnan(value) else share_style(value / series.full)
        for value in values
    ]
    at = rows - 1 - min(int(series.level / series.high * rows), rows - 1) if series.level else -1
    facts = _facts(series, rows, at)
    lines = []
    for row in range(rows):
        label = pad_or_truncate(series.label if row == 0 else "", LABEL)
        drawn = filled[row] if row < rows - 1 else filled[row].replace(" ", NOTHING)
        line = Content.styled(label, "bold") + _chart_row(drawn, styles, row == at)
        fact, style = facts[row]
        lines.append(line + Content.styled(f" {pad_or_truncate(fact, facts_width)}", style))
    return lines


def _chart_row(cells: str, styles: Sequence[str], is_level: bool) -> Content:
    """Cells in the style of their column; the level is drawn where they are empty."""
    marked = [
        (LEVEL, "$accent") if is_level and cell in (" ", NOTHING) else (cell, styles[x])
        for x, cell in enumerate(cells)
    ]
    runs = (
        (style, "".join(cell for cell, _ in run))
        for style, run in groupby(marked, key=lambda pair: pair[1])
    )
    return Content.assemble(*((text, style) for style, text in runs))


def _facts(series: Series, rows: int, at: int) -> list[tuple[str, str]]:
    """What stands beside each row: the present value, then the others below it; the level beside
    its line.
    """
    facts = [fact for fact in series.facts if fact]
    texts = [("", "")] * rows
    level = f"{LEVEL} {in_units(round(series.level))} predicted" if at >= 0 else ""
    if rows == 1:  # there is one place
        predicted = f"{LEVEL} {in_units(round(series.level))}"
        return [(" ".join([facts[0], predicted]) if level else "  ".join(facts), "bold")]
    free = [row for row in range(rows) if row != at]
    for number, (row, fact) in enumerate(zip(free, facts, strict=False)):
        texts[row] = fact, "bold" if number == 0 else "$foreground 65%"
    if level:
        texts[at] = level, "$accent"
    return texts
