"""Which model to ship: all models in a table and against each other, the pointed one in words."""

from collections.abc import Iterable, Sequence

from textual import on, work
from textual.containers import Vertical
from textual.content import Content
from textual.widget import Widget

from pipeline.views.evaluations import Evaluation, Measure, Method
from tui.panes.menu import Menu
from tui.panes.plot.plot import Plot
from tui.panes.plot.series import Axis
from tui.panes.table import Table
from tui.panes.text import Text
from tui.screens.results import methods
from tui.screens.results.reading import Results
from tui.screens.results.view import View

ONE_QUANTITY = (
    "One quantity was measured, so there is nothing to draw it against. Set evaluate.old_data."
)


class MethodsView(View):
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

    @property
    def evaluation(self) -> Evaluation | None:
        found = self.results.evaluation
        return None if isinstance(found, str) else found

    def show_results(self, results: Results) -> None:
        found, is_first = self.evaluation, not self.table.rows
        self.set_class(found is None, "-empty")
        if found is None:
            self.table.nothing = str(results.evaluation)
            self.table.show([])
            self.titled("methods")
            return
        self.table.show(found.methods, list(methods.columns(found)))
        if is_first and found.forgot_least:
            self.point(found.forgot_least.name)
        self.titled("methods", *_facts(found))

    @on(Table.Pointed)
    def pointed(self, event: Table.Pointed) -> None:
        method, found = event.row, self.evaluation
        if found:
            self.titled("model", title=method.stage.title)
            self.details.show(lambda _: methods.details(method, found))
            self._draw(found)

    def _draw(self, found: Evaluation) -> None:
        measures = [self._measures(found, axis)[:1] for axis in "xy"]
        if measures[0] == measures[1]:
            self.scatter.show([], empty=ONE_QUANTITY)
            return
        [x], [y] = measures
        pointed = self.table.pointed
        points = methods.points(found, x, y, pointed.name if pointed else "")
        self.scatter.show(points, _axis(x), _axis(y))

    def _measures(self, found: Evaluation, axis: str) -> Sequence[Measure]:
        """What an axis can show: what was chosen, then the default first."""
        first, second = (found.learned, found.kept) if axis == "x" else (found.kept, found.learned)
        # without texts to measure forgetting on, the tasks say what was kept
        measures = [*first, *found.tasks, *second]
        return sorted(measures, key=lambda measure: measure.name != self.chosen[axis])

    @work
    async def choose_axis(self, axis: str) -> None:
        """Choose the quantity to the right (x), or upwards (y)."""
        if found := self.evaluation:
            choices = {measure.name: measure.name for measure in self._measures(found, axis)}
            title = "To the right" if axis == "x" else "Upwards"
            name = await self.app.push_screen_wait(Menu(title, choices))
            self.chosen[axis] = name or self.chosen[axis]
            self._draw(found)


def _axis(measure: Measure) -> Axis:
    return Axis(measure.name, log=None, falls=measure.falls, share=measure.share)


def _words(method: Method) -> str:
    return f"{method.name} {method.stage.title}"


def _facts(found: Evaluation) -> Iterable[Content | str]:
    """The verdict, and what forgot least."""
    broken = found.limits and found.limits.broken
    yield Content.styled(found.verdict, "bold $error" if broken else "bold $success")
    if least := found.forgot_least:
        kept = found.kept[0]
        value = kept.of(least.numbers)
        share = f", {kept.format(value)} kept" if kept.share and value is not None else ""
        yield f"{methods.LEAST} forgot least: {least.name}{share}"
