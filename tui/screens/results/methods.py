"""Which model to ship: the columns of a table, the points of a scatter, the pointed one in words."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

from textual.content import Content

from pipeline.evaluation.comparison import MISSING
from pipeline.views.evaluations import Evaluation, Measure, Method, in_words
from tui.panes.lines import MUTED
from tui.panes.plot.series import Point
from tui.panes.table import Column
from tui.screens.results.about import BEST
from tui.widgets.cells import bar_cell, interval_strip, method_sign
from tui.widgets.colors import share_style

BAR = 8  # cells of a bar in the table
KEPT = "kept"
SHORT = {"new sentences completed": "new\ncompleted", "old answers kept": "answers\nkept"}
FURTHER = (  # further numbers of `lora report`
    "new\nloss",
    "old\nloss",
    "old loss\nchange",
    "KL from\nbase",
    "prefers\nchosen",
)


def sign_of(method: Method) -> tuple[str, str]:
    """Its method's sign and style; of a merged adapter LoRA's."""
    return method_sign("lora" if method.stage.method == "merge" else method.stage.method)


def columns(evaluation: Evaluation) -> Iterator[Column[Method]]:
    """Bars for what each learned and kept, its size, tasks with intervals, all other numbers."""
    yield Column("model", partial(_name, evaluation), lambda method: method.name)
    for title, measures in (("learned", evaluation.learned), (KEPT, evaluation.kept)):
        for measure in measures[:1]:
            yield _measured(title, measure, partial(_bar, measure, title))
    yield _number("share\nof all", "trained")
    yield Column("size", lambda m: m.size, lambda m: m.numbers.get("bytes"), right=True)
    for measure in evaluation.tasks:
        yield _measured(f"task: {measure.name}", measure, partial(_task, measure))
    for heading in FURTHER:
        if any(heading in method.cells for method in evaluation.methods):
            yield _number(heading, heading.replace("\n", " "))


def _number(heading: str, title: str) -> Column[Method]:
    """A column of a number that `lora report` prints under this heading."""

    def text(method: Method) -> str:
        return method.cells.get(heading, MISSING)

    def order(method: Method) -> float | None:
        """The number, the last of several: `50% → 75%`."""
        with suppress(ValueError):
            return float(text(method).split()[-1].rstrip("%").replace(",", ""))
        return None

    return Column(title, text, order, right=True, largest_first=heading == FURTHER[-1])


def _measured(
    title: str, measure: Measure, cell: Callable[[Method], Content | str]
) -> Column[Method]:
    """A column of a measure, the best first."""
    best_is_largest = not measure.falls
    return Column(
        title, cell, lambda method: measure.of(method.numbers), largest_first=best_is_largest
    )


def _name(evaluation: Evaluation, method: Method) -> Content:
    sign, style = sign_of(method)
    marks = {
        (" ✗", "$error"): bool(method.broken),
        (" ●", "$warning"): bool(method.apart),
        (f" {BEST}", "bold $success"): method == evaluation.forgot_least,
    }
    parts = [mark for mark, is_shown in marks.items() if is_shown]
    return Content.assemble((f"{sign} {method.name}", style), *parts)


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
        numbers, (sign, style) = method.numbers, sign_of(method)
        right, up = x.of(numbers), y.of(numbers)
        if right is not None and up is not None:
            label = f"{method.name} ✗" if method.broken else method.name
            intervals = x.interval(numbers), y.interval(numbers)
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
