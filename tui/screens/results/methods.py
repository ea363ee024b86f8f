"""Which model to ship: all models in a table and against each other, the pointed one in words."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from textual import on, work
from textual.containers import Vertical
from textual.content import Content
from textual.widget import Widget

from pipeline.evaluation.comparison import MISSING
from pipeline.views.evaluations import Evaluation, Measure, Method, in_words
from tui.panes.lines import MUTED
from tui.panes.menu import Menu
from tui.panes.numbers import numbers
from tui.panes.plot.plot import Plot
from tui.panes.plot.series import Axis, Point
from tui.panes.table import Column, Table
from tui.panes.text import Text
from tui.screens.results.about import BEST
from tui.screens.results.view import View
from tui.widgets.cells import bar_cell, interval_strip, method_sign
from tui.widgets.colors import share_style

BAR = 8  # cells of a bar in the table
KEPT = "kept"
SHORT = {"new sentences completed": "new\ncompleted", "old answers kept": "answers\nkept"}
TRAINED = Measure("trained", lambda numbers: numbers["trainable_percent"])
ONE_QUANTITY = (
    "One quantity was measured, so there is nothing to draw it against. Set evaluate.old_data."
)
TITLES = {"x": "To the right", "y": "Upwards"}


class MethodsView(View):
    def __init__(self) -> None:
        super().__init__(id="methods-view")
        self.scatter, self.details = Plot(), Text()
        self.table = Table[Method](key=lambda method: method.name, words=_words)
        self.table.sorted_by = KEPT
        self.chosen = {"x": "", "y": ""}  # the measures that the user chose

    def compose(self) -> Iterable[Widget]:
        yield self.pane("scatter", self.scatter)
        with Vertical(id="side"):
            yield self.pane("methods", self.table)
            yield self.pane("model", self.details)

    def show_found(self) -> None:
        found, is_first = self.found, not self.table.rows
        self.table.show(found.methods, columns(found))
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
            self.details.show(lambda _: details(method, found))
            self._draw()

    def _draw(self) -> None:
        (x, *_), (y, *_) = self._measures("x"), self._measures("y")
        shown = [] if x == y else points(self.found, x, y, self.table.pointed)
        self.scatter.show(shown, _axis(x), _axis(y), empty=ONE_QUANTITY)

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


def sign_of(method: Method) -> tuple[str, str]:
    """Its method's sign and style; of a merged adapter LoRA's."""
    return method_sign("lora" if method.stage.method == "merge" else method.stage.method)


def columns(evaluation: Evaluation) -> list[Column[Method]]:
    """What each learned and kept, its size, tasks with intervals, then all else that was measured."""
    learned = _measured("learned", evaluation.learned)
    kept = _measured(KEPT, evaluation.kept)
    tasks = [
        _column(f"task: {measure.name}", measure, partial(_task, measure))
        for measure in evaluation.tasks
    ]
    return [
        Column("model", partial(_name, evaluation), lambda method: method.name),
        *(*learned[:1], *kept[:1]),
        numbers("trained", lambda m: TRAINED.of(m.numbers), "{:.1f}%".format),
        Column("size", lambda m: m.size, lambda m: m.numbers.get("bytes"), right=True),
        *(*tasks, *learned[1:], *kept[1:]),
    ]


def _measured(title: str, measures: Sequence[Measure]) -> list[Column[Method]]:
    """A column of each measure; the first has the title."""
    names = [title, *(measure.name for measure in measures[1:])]
    return [
        _column(name, measure, partial(_bar, measure, title))
        for name, measure in zip(names, measures, strict=False)
    ]


def _column(
    title: str, measure: Measure, cell: Callable[[Method], Content | str]
) -> Column[Method]:
    """A column of a measure, the best first."""
    best_is_largest = not measure.falls
    return Column(
        title, cell, lambda method: measure.of(method.numbers), largest_first=best_is_largest
    )


def _name(evaluation: Evaluation, method: Method) -> Content:
    sign, style = sign_of(method)
    parts = [(f"{sign} {method.name}", style)]
    parts += [(" ✗", "$error")] * bool(method.broken)
    parts += [(" ●", "$warning")] * bool(method.apart)
    parts += [(f" {BEST}", "bold $success")] * (method == evaluation.forgot_least)
    return Content.assemble(*parts)


def _bar(measure: Measure, title: str, method: Method) -> Content:
    """A share with a bar, another quantity as a number."""
    value = measure.of(method.numbers)
    if value is None:
        return Content(MISSING)
    text = method.cells.get(SHORT.get(measure.name, ""), measure.format(value))
    style = share_style(1 - value) if title == KEPT else "$primary"
    return bar_cell(value, BAR, style, text) if measure.share else Content(text)


def _task(measure: Measure, method: Method) -> str:
    """`··──●──· 0.70`: the score with its interval."""
    value = measure.of(method.numbers)
    if value is None:
        return MISSING
    low, high = measure.interval(method.numbers)
    return f"{interval_strip(low, value, high)} {value:.2f}"


def points(evaluation: Evaluation, x: Measure, y: Measure, pointed: Method | None) -> list[Point]:
    """A sign for each model of which both were measured, the pointed one first."""
    found = []
    for method in sorted(evaluation.methods, key=lambda method: method is not pointed):
        measured, label = method.numbers, f"{method.name}{' ✗' * bool(method.broken)}"
        right, up = x.of(measured), y.of(measured)
        if right is not None and up is not None:
            sign, style = sign_of(method)
            intervals = x.interval(measured), y.interval(measured)
            found.append(Point(right, up, sign, label, style, method is pointed, *intervals))
    return found


def details(method: Method, evaluation: Evaluation) -> Iterator[Content]:
    """What a model costs, what it learned and kept, its tasks, the limits that it breaks."""
    for limit in method.broken:
        yield Content.styled(f"✗ breaks {limit}", "$error")
    if method.verdict and method.broken:
        yield Content(method.verdict.next_step)
    elif method.verdict:
        yield Content.styled("✓ keeps evaluate.limits", "$success")
    if method.apart:
        yield Content.styled(f"● {', '.join(method.apart)}", "$warning")
    if other := method.numbers.get("measured_as"):
        note = f"numbers of {other}: by the merge's certificate, both answer alike"
        yield Content.styled(note, MUTED)
    yield from map(Content, in_words(method))
    if evaluation.tasks:
        yield Content()
        yield Content.styled("tasks: score, 95% interval, change from the base", MUTED)
    width = min(max((len(task.name) for task in evaluation.tasks), default=0), 20)
    for task in evaluation.tasks:
        scores = method.numbers.get("tasks", {}).get(task.name, {})
        text = f"{task.name[:width]:<{width}}  {_task(task, method)}"
        if change := scores.get("difference"):
            change = f"  {change['score']:+.2f} ({change['low']:+.2f} to {change['high']:+.2f})"
            text += change.replace("-", "−")
        yield Content(text)
