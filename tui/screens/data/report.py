"""What a check of all rows says: lengths as a histogram with the cut, and problems, which lead to
their rows.
"""

from collections.abc import Callable, Iterable, Mapping

from textual.containers import Horizontal
from textual.content import Content
from textual.widget import Widget

from pipeline.views.data_files import DataFile, flat
from pipeline.views.data_rows import (
    Answer,
    Lengths,
    Problem,
    length_counts,
    length_facts,
    problem_facts,
)
from tui.panes.pane import Pane
from tui.panes.plot.plot import Plot
from tui.panes.plot.series import Axis, Bars, Rule, Series
from tui.panes.table import Column, Table
from tui.screens.data.about import LENGTHS, PROBLEMS
from tui.screens.data.reader import Reader
from tui.screens.data.rows import SIGNS

NO_MODEL = "No model yet, so tokens are not counted: run import or pretrain."


class Report(Horizontal):
    """Two panes: lengths and problems of the reader's file.

    `mark` is called with what a check says of rows: number → error, or else warning.
    """

    def __init__(self, reader: Reader, mark: Callable[[Mapping[int, str]], None]) -> None:
        super().__init__(id="report")
        self._reader, self._mark = reader, mark
        column = Column[Problem]("problem", _problem, fills=True)
        self.problems = Table[Problem](key=lambda each: each, columns=[column], titles=False)
        self.plot = Plot()
        self.lengths_pane = Pane(LENGTHS, self.plot, id="lengths")
        self.problems_pane = Pane(PROBLEMS, self.problems, id="problems")

    def compose(self) -> Iterable[Widget]:
        yield self.lengths_pane
        yield self.problems_pane

    def say(self, problems: str, lengths: str = "") -> None:
        """Sentences in place of a report."""
        self.problems.nothing = flat(problems)
        self.problems.show([])
        self.problems_pane.show_title()
        self.plot.show([], empty=lengths)
        self.lengths_pane.show_title()

    def measure(self) -> None:
        """Check all rows, and count their tokens."""
        self.say("checking …")
        self._reader.ask(self, "check", self._show, self.say)

    def _show(self, answer: Answer) -> None:
        if answer["event"] == "rows":
            self.say(f"checking … {answer['rows']:,} rows")
            return
        file = self._reader.file
        self.problems.nothing = Content.styled("✓ none", "$success")
        problems = [Problem(*map(each.get, Problem._fields)) for each in answer["problems"]]
        self.problems.show(problems)
        self.problems_pane.show_title(*problem_facts(answer))
        empty = NO_MODEL if answer["tokens"] is None else "No example could be counted."
        self.plot.show(*histogram(answer["lengths"], file), empty=empty)
        self.lengths_pane.show_title(*length_facts(answer, file))
        # errors come first, and a row keeps the first
        self._mark({each.row: each.level for each in reversed(problems) if each.row is not None})


def _problem(problem: Problem) -> Content:
    sign, style = SIGNS[problem.level]
    row = "" if problem.row is None else f"{problem.row:,}  "
    return Content.assemble((f"{sign} ", style), (row, "bold"), flat(problem.problem))


def histogram(lengths: Lengths, file: DataFile) -> tuple[list[Series], Axis, Axis]:
    """The lengths, a rule where examples are cut or windowed, and the axes. Red where some are
    cut.
    """
    if not lengths:
        return [], Axis(), Axis()
    name = "max_length" if file.max_length else "window"
    limit, longest = file.max_length or file.window, lengths[-1][0]
    longest = max(longest, min(limit, 2 * longest))

    def columns(width: int) -> list[tuple[float, str]]:
        counts = length_counts(lengths, longest, file.max_length, width)
        return [(count, "$error" if cut else "$accent") for count, cut in counts]

    series: list[Series] = [Bars(columns)]
    if 0 < limit <= longest:
        series.append(Rule(limit, label=f"{name} {limit:,}", style="$warning"))
    marks = [(0, "0"), (longest, f"{longest:,} tokens")]
    return series, Axis(range=(0, longest + 1), marks=marks), Axis("examples")
