"""Which model to ship: the columns of a table, the points of a scatter, the pointed one in words."""

from collections.abc import Callable, Iterator
from functools import partial

from textual.content import Content

from pipeline.evaluation.comparison import MISSING
from pipeline.views.evaluations import Evaluation, Measure, Method, in_words
from tui.panes.plot.series import Point
from tui.panes.table import Column
from tui.widgets.cells import bar_cell, interval_strip, method_sign
from tui.widgets.colors import share_style

BAR = 8  # cells of a bar in the table
LEAST = "◂"  # marks the model that forgot least
LEARNED, KEPT = "learned", "kept"
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
    for title, measures in ((LEARNED, evaluation.learned), (KEPT, evaluation.kept)):
        for measure in measures[:1]:
            yield _measured(title, measure, _bar(measure, evaluation, title))
    yield _number("share\nof all", "trained")
    yield Column("size", lambda m: m.size, lambda m: _value(m.size.split()[0]), right=True)
    for measure in evaluation.tasks:
        yield _measured(f"task: {measure.name}", measure, partial(_task, measure))
    for heading in FURTHER:
        if any(heading in method.cells for method in evaluation.methods):
            yield _number(heading, heading.replace("\n", " "))


def _number(heading: str, title: str) -> Column[Method]:
    """A column of a number that `lora report` prints under this heading."""

    def text(method: Method) -> str:
        return method.cells.get(heading, MISSING)

    is_share = heading == FURTHER[-1]
    return Column(
        title, text, lambda method: _value(text(method)), right=True, largest_first=is_share
    )


def _value(text: str) -> float | None:
    """The number that a cell shows, the last of several: `50% → 75%`."""
    try:
        return float(text.split()[-1].rstrip("%").replace(",", ""))
    except ValueError:
        return None


def _name(evaluation: Evaluation, method: Method) -> Content:
    sign, style = sign_of(method)
    parts = [(f"{sign} {method.name}", style)]
    if method.broken:
        parts.append((" ✗", "$error"))
    if method.apart:
        parts.append((" ●", "$warning"))
    if method == evaluation.forgot_least:
        parts.append((f" {LEAST}", "bold $success"))
    return Content.assemble(*parts)


def _bar(measure: Measure, evaluation: Evaluation, title: str) -> Callable[[Method], Content]:
    """A cell with a bar: of a share that of the whole, of other quantities that of the best to the
    worst.
    """
    values = [measure.of(method.numbers) for method in evaluation.methods]
    known = [measure.better(value) for value in values if value is not None]
    worst, best = min(known, default=0.0), max(known, default=0.0)
    heading = SHORT.get(measure.name, "")

    def cell(method: Method) -> Content:
        value = measure.of(method.numbers)
        if value is None:
            return Content(f"{' ' * BAR} {MISSING}")
        share = value
        if not measure.share:
            share = (measure.better(value) - worst) / (best - worst or 1.0)
        style = share_style(1 - share) if title == KEPT else "$primary"
        return bar_cell(share, BAR, style, method.cells.get(heading, measure.format(value)))

    return cell


def _measured(
    title: str, measure: Measure, cell: Callable[[Method], Content | str]
) -> Column[Method]:
    """A column of a measure, the best first."""
    best_is_largest = not measure.falls
    return Column(
        title, cell, lambda method: measure.of(method.numbers), largest_first=best_is_largest
    )


def _task(measure: Measure, method: Method) -> str:
    value = measure.of(method.numbers)
    return MISSING if value is None else f"{_strip(measure, method)} {value:.2f}"


def _strip(measure: Measure, method: Method) -> str:
    low, high = measure.interval(method.numbers)
    return interval_strip(low, measure.of(method.numbers) or 0.0, high)


def points(evaluation: Evaluation, x: Measure, y: Measure, pointed: str) -> list[Point]:
    """A sign for each model of which both were measured, the pointed one first."""
    found = []
    for method in sorted(evaluation.methods, key=lambda method: method.name != pointed):
        right, up = x.of(method.numbers), y.of(method.numbers)
        if right is not None and up is not None:
            sign, style = sign_of(method)
            label = f"{method.name} ✗" if method.broken else method.name
            intervals = x.interval(method.numbers), y.interval(method.numbers)
            found.append(Point(right, up, sign, label, style, method.name == pointed, *intervals))
    return found


def details(method: Method, evaluation: Evaluation) -> Iterator[Content]:
    """What a model costs, what it learned and kept, its tasks, the limits that it breaks."""
    numbers = method.numbers
    for limit in method.broken:
        yield Content.styled(f"✗ breaks {limit}", "$error")
    if method.verdict and method.broken:
        yield Content(method.verdict.next_step)
    elif method.verdict:
        yield Content.styled("✓ keeps evaluate.limits", "$success")
    if method.apart:
        yield Content.styled(f"● {', '.join(method.apart)}", "$warning")
    if other := numbers.get("measured_as"):
        note = f"numbers of {other}: by the merge's certificate, both answer alike"
        yield Content.styled(note, "$foreground-muted")
    yield from map(Content, in_words(method))
    yield from _tasks(method, evaluation)


def _tasks(method: Method, evaluation: Evaluation) -> Iterator[Content]:
    width = min(max((len(task.name) for task in evaluation.tasks), default=0), 20)
    if width:
        yield Content("")
        yield Content.styled(
            "tasks: score, 95% interval, change from the base", "$foreground-muted"
        )
    for task in evaluation.tasks:
        value = task.of(method.numbers)
        if value is None:
            continue
        text = f"{task.name[:width]:<{width}}  {_strip(task, method)} {value:.2f}"
        if change := method.numbers["tasks"][task.name].get("difference"):
            change = f"  {change['score']:+.2f} ({change['low']:+.2f} to {change['high']:+.2f})"
            text += change.replace("-", "−")
        yield Content(text)
