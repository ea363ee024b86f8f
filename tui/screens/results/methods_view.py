"""Which model to ship: all models in a table and against each other, the pointed one in words."""

from collections.abc import Iterable, Sequence

from textual import on, work
from textual.containers import Vertical
from textual.content import Content
from textual.widget import Widget

from pipeline.views.evaluations import Measure, Method
from tui.panes.menu import Menu
from tui.panes.plot.plot import Plot
from tui.panes.plot.series import Axis
from tui.panes.table import Table
from tui.panes.text import Text
from tui.screens.results import methods
from tui.screens.results.about import BEST
from tui.screens.results.view import View

ONE_QUANTITY = (
    "One quantity was measured, so there is nothing to draw it against. Set evaluate.old_data."
)
TITLES = {"x": "To the right", "y": "Upwards"}


class MethodsView(View):
    FIELD = "evaluation"

    def __init__(self) -> None:
        super().__init__(id="methods-view")
        self.scatter, self.details = Plot(), Text()
        self.table = Table[Method](key=lambda method: method.name, words=_words)
        self.table.sorted_by = methods.KEPT
        self.chosen = {"x": "", "y": ""}  # the measures that the user chose

    def compose(self) -> Iterable[Widget]:
        yield self.pane("scatter", self.scatter)
        with Vertical(id="side"):
            yield self.pane("methods", self.table)
            yield self.pane("model", self.details)

    def show_found(self) -> None:
        found, is_first = self.found, not self.table.rows
        self.table.show(found.methods, list(methods.columns(found)))
        broken, least = found.limits and found.limits.broken, found.forgot_least
        verdict = Content.styled(found.verdict, "bold $error" if broken else "bold $success")
        self.titled("methods", verdict, f"{BEST} forgot least: {least.name}" if least else "")
        if is_first and least:
            self.table.point(least.name)

    @on(Table.Pointed)
    def pointed(self, event: Table.Pointed) -> None:
        method, found = event.row, self.found
        if self.table.rows:  # still
            self.titled("model", title=method.stage.title)
            self.details.show(lambda _: methods.details(method, found))
            self._draw()

    def _draw(self) -> None:
        (x, *_), (y, *_) = self._measures("x"), self._measures("y")
        points = [] if x == y else methods.points(self.found, x, y, self.table.pointed)
        self.scatter.show(points, _axis(x), _axis(y), empty=ONE_QUANTITY)

    def _measures(self, axis: str) -> Sequence[Measure]:
        """What an axis can show: what was chosen, then the default first."""
        # without texts to measure forgetting on, the tasks say what was kept
        groups = [self.found.learned, self.found.tasks, self.found.kept]
        if axis == "y":
            groups.reverse()
        measures = [measure for group in groups for measure in group]
        return sorted(measures, key=lambda measure: measure.name != self.chosen[axis])

    @work
    async def choose_axis(self, axis: str) -> None:
        """Choose the quantity to the right (x), or upwards (y)."""
        if self.table.rows:
            choices = {measure.name: measure.name for measure in self._measures(axis)}
            name = await self.app.push_screen_wait(Menu(TITLES[axis], choices))
            self.chosen[axis] = name or self.chosen[axis]
            self._draw()


def _axis(measure: Measure) -> Axis:
    return Axis(measure.name, log=None, falls=measure.falls, share=measure.share)


def _words(method: Method) -> str:
    return f"{method.name} {method.stage.title}"
