"""Which model to ship: learned against kept as a scatter, a table with a bar for each, and the
pointed one in words.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

from rich.style import Style
from rich.text import Text
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widget import Widget
from textual.widgets import Static

from pipeline.evaluation.comparison import LEGEND, MISSING
from pipeline.views.evaluations import Evaluation, Measure, Method
from tui.screens.results.rows import Column, RowsPane
from tui.widgets.colors import NO_LOOK, method_look, method_style, share_style
from tui.widgets.pane import Pane
from tui.widgets.plot.scatter import Axis, Point, draw
from tui.widgets.text import bar

BAR = 8  # cells of a bar in the table
INTERVAL = 12  # cells of an interval from 0 to 1
LEAST = "◂"  # marks the model that forgot least
NOTHING = (
    "Nothing is evaluated yet. Press R to run the pipeline: it trains, then compares what each "
    "model learned and kept."
)


def sign_of(method: Method) -> str:
    """Its method's sign; of a base a ring, of a merged adapter LoRA's."""
    return (
        "○" if method_look(_look_name(method)) is NO_LOOK else method_look(_look_name(method)).sign
    )


def _look_name(method: Method) -> str:
    return "lora" if method.stage.method == "merge" else method.stage.method


def style_of(method: Method, widget: Widget) -> str:
    """Its method's colour, readable where the widget stands; of a base the text's."""
    if method_look(_look_name(method)) is NO_LOOK:
        return widget.app.theme_variables["foreground"]
    return method_style(_look_name(method), widget.background_colors[1])


def interval_strip(low: float, value: float, high: float, width: int = INTERVAL) -> str:
    """A 95% interval from 0 to 1 in cells: `  ──●────  `."""
    first, at, last = (round(min(max(n, 0.0), 1.0) * (width - 1)) for n in (low, value, high))
    return "".join("●" if n == at else "─" if first <= n <= last else "·" for n in range(width))


class ScatterPane(Pane):
    """What each model learned, to the right, against what it kept, upwards: the best are in the
    upper right.
    """

    TITLE = "Learned against kept"
    HELP = """\
Each sign is a model: **to the right** it learned more of what is new, **upwards** it kept more of what the base
knew. The best is in the upper right corner. A quantity of which less is better, such as a loss, is drawn from right
to left, so this always holds. Lines through a sign are the 95% bootstrap intervals of a task's score. Models in one
cell share a sign and a label.

- `h` chooses what is shown to the right, `v` upwards: what was measured, and each task of `evaluate.tasks`.
"""
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("h", "choose('x')", "horizontal", id="results.horizontal"),
        Binding("v", "choose('y')", "vertical", id="results.vertical"),
    ]
    DEFAULT_CSS = """
    ScatterPane > Static { height: 1fr; }
    """
    can_focus = True

    class Chosen(Message):
        """The user wants to choose the quantity of an axis, "x" or "y"."""

        def __init__(self, axis: str) -> None:
            super().__init__()
            self.axis = axis

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.evaluation: Evaluation | None = None
        self.axes: dict[str, Measure] = {}
        self._pointed = ""

    def contents(self) -> Iterable[Widget]:
        yield Static(markup=False)

    def measures(self, axis: str) -> list[Measure]:
        """What an axis can show, the default first."""
        found = self.evaluation
        if found is None:
            return []
        first, second = (found.learned, found.kept) if axis == "x" else (found.kept, found.learned)
        # without texts to measure forgetting on, the tasks say what was kept
        return [*first, *found.tasks, *second]

    def show(self, evaluation: Evaluation | None, pointed: str) -> None:
        self.evaluation, self._pointed = evaluation, pointed
        for axis in ("x", "y"):
            choices = {measure.name: measure for measure in self.measures(axis)}
            before = self.axes.get(axis)
            chosen = choices.get(before.name if before else "", next(iter(choices.values()), None))
            if chosen:
                self.axes[axis] = chosen
            else:
                self.axes.pop(axis, None)
        self.redraw()

    def point(self, name: str) -> None:
        """Draw this model on top, with its label in reverse."""
        if name != self._pointed:
            self._pointed = name
            self.redraw()

    def set_axis(self, axis: str, name: str) -> None:
        self.axes[axis] = next(measure for measure in self.measures(axis) if measure.name == name)
        self.redraw()

    def action_choose(self, axis: str) -> None:
        self.post_message(self.Chosen(axis))

    def on_resize(self, event: Any) -> None:
        super().on_resize(event)
        self.redraw()

    def redraw(self) -> None:
        static = self.query_one(Static)
        if not static.size or self.evaluation is None:
            return
        x, y = self.axes.get("x"), self.axes.get("y")
        if x is None or y is None or x.name == y.name:
            static.update(
                Text(
                    "One quantity was measured, so there is nothing to draw it against. Set "
                    "evaluate.old_data."
                )
            )
            return
        methods = sorted(self.evaluation.methods, key=lambda method: method.name != self._pointed)
        points = [point for method in methods if (point := self._point(method, x, y))]
        axes = [
            Axis.around(
                measure.name,
                [getattr(point, name) for point in points],
                measure.share,
                falls=measure.falls,
            )
            for name, measure in (("x", x), ("y", y))
        ]
        muted = Style(dim=True)
        static.update(
            Text("\n").join(draw(points, axes[0], axes[1], *static.size, muted)), layout=False
        )

    def _point(self, method: Method, x: Measure, y: Measure) -> Point | None:
        right, up = x.of(method.numbers), y.of(method.numbers)
        if right is None or up is None:
            return None
        return Point(
            right,
            up,
            sign_of(method),
            f"{method.name} ✗" if method.broken else method.name,
            Style.parse(style_of(method, self)),
            method.name == self._pointed,
            x.interval(method.numbers),
            y.interval(method.numbers),
        )


class MethodsPane(RowsPane[Method]):
    """A row for each model: bars for what it learned and kept, its size, tasks with intervals, all
    other numbers.
    """

    TITLE = "Methods"
    HELP = f"""\
A row for each model that `lora evaluate` compared; the numbers are those of `lora report`.

- **learned**: answers as expected, new sentences completed word for word, or the loss on them (nats per token, less
  is better).
- **kept**: next-token choices on old sentences that are still the base's. Green: more than half; red: little.
- **trained**: share of all parameters. **size**: weights to store; an adapter's are beside one copy of its base.
- **task**: `··──●──·` is the score from 0 to 1 with its 95% bootstrap interval.
- `{LEAST}` forgot least. `✗` breaks a limit of `evaluate.limits`; the pane *Model* says which. `●`: its settings are
  not those of params.yaml, as after `--set`.

`c` or Enter prompts the model beside the base. `o` shows its loss curve, `i` all its numbers, `E` evaluates again.
← → move to the columns that do not fit.
"""
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("c", "ask('chat')", "chat", id="results.chat"),
        Binding("o", "ask('open')", "curve", id="results.open"),
        Binding("i", "ask('fields')", "all numbers", id="results.fields"),
        Binding("E", "ask('evaluate')", "evaluate", id="results.evaluate"),
        Binding("x", "ask('ship')", "ship", id="results.ship"),
    ]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.evaluation: Evaluation | None = None
        self.sorted_by = "kept"

    def key_of(self, row: Method) -> str:
        return row.name

    def words_of(self, row: Method) -> str:
        return f"{row.name} {row.stage.title}"

    def show(self, evaluation: Evaluation | str | None) -> None:
        """Show an evaluation, or a text that says why there is none."""
        if not isinstance(evaluation, Evaluation):
            self.evaluation = None
            self.say(evaluation or NOTHING)
            return
        self.evaluation = evaluation
        least = evaluation.forgot_least
        self.fill(evaluation.methods, self._columns(evaluation), least.name if least else "")
        self._show_facts(evaluation)

    def _show_facts(self, evaluation: Evaluation) -> None:
        variables, facts = self.app.theme_variables, list[str | Text]()
        if verdict := evaluation.verdict:
            color = variables[
                "error" if evaluation.limits and evaluation.limits.broken else "success"
            ]
            facts.append(Text(verdict, f"bold {color}"))
        if least := evaluation.forgot_least:
            kept = evaluation.kept[0]
            value = kept.of(least.numbers)
            text = f"{LEAST} forgot least: {least.name}"
            facts.append(
                f"{text}, {kept.format(value)} kept" if kept.share and value is not None else text
            )
        self.show_title(*facts)

    def _columns(self, evaluation: Evaluation) -> Iterable[Column]:
        def text(heading: str) -> Callable[[Method], Text]:
            return lambda method: Text(method.cells.get(heading, MISSING), justify="right")

        yield Column("model", self._name_cell, lambda method: method.name)
        for title, measures in (("learned", evaluation.learned), ("kept", evaluation.kept)):
            for measure in measures[:1]:
                yield Column(
                    title, self._bar(measure, evaluation, title == "kept"), _best_first(measure)
                )
        yield Column("trained", text("share\nof all"), lambda m: m.numbers.get("trainable_percent"))
        yield Column("size", lambda m: _size(m, evaluation), lambda m: m.numbers["bytes"])
        for measure in evaluation.tasks:
            yield Column(
                f"task: {measure.name}",
                lambda m, each=measure: _task(m, each),  # type: ignore[misc]
                _best_first(measure),
            )
        measured = (  # further numbers of `lora report`
            ("new\nloss", lambda m: m.numbers.get("new_loss")),
            ("old\nloss", lambda m: m.numbers.get("old_loss")),
            ("old loss\nchange", lambda m: m.numbers["forgetting"]["loss_rise"]),
            ("KL from\nbase", lambda m: m.numbers["forgetting"]["divergence"]),
            ("prefers\nchosen", lambda m: -m.numbers["preferences"]["after"]["accuracy"]),
        )
        for heading, order in measured:
            if any(heading in method.cells for method in evaluation.methods):
                yield Column(heading.replace("\n", " "), text(heading), order)

    def _name_cell(self, method: Method) -> Text:
        least = self.evaluation and self.evaluation.forgot_least
        name = Text(f"{sign_of(method)} {method.name}", style_of(method, self), no_wrap=True)
        if method.broken:
            name.append(" ✗", self.app.theme_variables["error"])
        if method.apart:
            name.append(" ●", self.app.theme_variables["warning"])
        return (
            name.append(f" {LEAST}", f"bold {self.app.theme_variables['success']}")
            if method == least
            else name
        )

    def _bar(
        self, measure: Measure, evaluation: Evaluation, kept: bool
    ) -> Callable[[Method], Text]:
        """A cell with a bar, of a share that of the whole, of other quantities that of the best to
        the worst.
        """
        values = [
            v for method in evaluation.methods if (v := measure.of(method.numbers)) is not None
        ]
        worst, best = (f(map(measure.better, values), default=0.0) for f in (min, max))
        heading = {
            "new sentences completed": "new\ncompleted",
            "old answers kept": "answers\nkept",
        }.get(measure.name)

        def cell(method: Method) -> Text:
            value = measure.of(method.numbers)
            if value is None:
                return Text(f"{' ' * BAR} {MISSING}")
            share = (
                value if measure.share else (measure.better(value) - worst) / (best - worst or 1.0)
            )
            color = share_style(1 - share).removeprefix("$") if kept else "primary"
            words = method.cells.get(heading or "", measure.format(value))
            return Text.assemble(
                (bar(share, BAR), self.app.theme_variables[color]), f" {words}", no_wrap=True
            )

        return cell


def _best_first(measure: Measure) -> Callable[[Method], float | None]:
    def order(method: Method) -> float | None:
        value = measure.of(method.numbers)
        return None if value is None else -measure.better(value)

    return order


def _size(method: Method, evaluation: Evaluation) -> Text:
    heading = next(name for name in evaluation.methods[0].cells if name.startswith("size"))
    unit = heading.partition("(")[2].rstrip(")")
    return Text(f"{method.cells[heading]} {unit}", justify="right", no_wrap=True)


def _task(method: Method, measure: Measure) -> Text:
    value = measure.of(method.numbers)
    if value is None:
        return Text(MISSING)
    return Text(f"{_strip(method, measure)} {value:.2f}", no_wrap=True)


def _strip(method: Method, measure: Measure) -> str:
    low, high = measure.interval(method.numbers)
    return interval_strip(low, measure.of(method.numbers) or 0.0, high)


class DetailPane(Pane):
    """The pointed model in sentences: what it costs, what it learned and kept, its tasks, the
    limits that it breaks.
    """

    TITLE = "Model"
    HELP = """\
The model that the table's cursor is on. A task's line is its score from 0 to 1 with the 95% bootstrap interval,
then the change from the base, example by example, with its own interval: a change whose interval holds 0 may be
chance.
"""
    can_focus = True
    DEFAULT_CSS = """
    DetailPane { overflow-y: auto; }
    DetailPane > Static { height: auto; }
    """

    def contents(self) -> Iterable[Widget]:
        yield Static(markup=False)

    def show(self, method: Method, evaluation: Evaluation) -> None:
        """Describe a model."""
        self.show_title(title=method.stage.title)
        lines = list(self._lines(method, evaluation))
        self.query_one(Static).update(Text("\n").join(lines))

    def _lines(self, method: Method, evaluation: Evaluation) -> Iterable[Text]:
        numbers, variables = method.numbers, self.app.theme_variables
        for limit in method.broken:
            yield Text(f"✗ breaks {limit}", variables["error"])
        if method.verdict and method.broken:
            yield Text(method.verdict.next_step)
        elif method.verdict:
            yield Text("✓ keeps evaluate.limits", variables["success"])
        if method.apart:
            yield Text(f"● {', '.join(method.apart)}", variables["warning"])
        if other := numbers.get("measured_as"):
            yield Text(f"numbers of {other}: by the merge's certificate, both answer alike", "dim")
        size = _size(method, evaluation).plain.strip()
        if "trainable" in numbers:
            count, share = numbers["trainable"], method.cells.get("share\nof all", "")
            beside = " beside one copy of its base" if method.stage.kind == "adapter" else ""
            yield Text(
                f"trained {count:,} of {numbers.get('parameters', 0):,} parameters, {share}; "
                f"{size} to store{beside}"
            )
        else:
            yield Text(f"{numbers.get('parameters', 0):,} parameters; {size} to store")
        for label, headings in (("learned", LEARNED_CELLS), ("kept", KEPT_CELLS)):
            said = [
                form.format(method.cells[name])
                for name, form in headings.items()
                if _measured(method, name)
            ]
            if said:
                yield Text(f"{label:<8}").append(", ".join(said))
        kept, old, right, wrong = (numbers.get(key, 0) for key in PROMPTS)
        if old or wrong:
            yield Text(
                f"prompts {kept} of {old} keep their answer, {right} of {wrong} have the "
                "corrected one"
            )
        wide = min(max((len(task.name) for task in evaluation.tasks), default=0), 20)
        if wide:
            yield Text("\ntasks: score, 95% interval, change from the base", "dim")
        for task in evaluation.tasks:
            yield from _task_line(method, task, wide)


PROMPTS = ("old_prompts_kept", "old_prompts", "prompts_corrected", "prompts_to_correct")
LEARNED_CELLS = {
    "new\ncompleted": "{} new sentences completed",
    "new\nloss": "loss {} on new sentences",
    "prefers\nchosen": "chosen answers preferred {}",
}
KEPT_CELLS = {
    "answers\nkept": "{} of old answers",
    "old\nloss": "loss {} on old sentences",
    "old loss\nchange": "{} from the base",
    "KL from\nbase": "KL {}",
}


def _measured(method: Method, heading: str) -> bool:
    return method.cells.get(heading, MISSING) != MISSING


def _task_line(method: Method, task: Measure, width: int) -> Iterable[Text]:
    value = task.of(method.numbers)
    if value is None:
        return
    scores: Mapping[str, Any] = method.numbers["tasks"][task.name]
    line = Text(f"{task.name[:width]:<{width}}  {_strip(method, task)} {value:.2f}", no_wrap=True)
    if change := scores.get("difference"):
        said = f"  {change['score']:+.2f} ({change['low']:+.2f} to {change['high']:+.2f})"
        line.append(said.replace("-", "−"))
    yield line


def fields(method: Method, legend: Sequence[tuple[str, str]] = LEGEND) -> str:
    """All numbers of a model and what they mean, as Markdown."""
    rows = [
        f"| {heading.replace(chr(10), ' ')} | {text} |" for heading, text in method.cells.items()
    ]
    notes = [f"- {text}" for heading, text in legend if not heading or heading in method.cells]
    path = f"`{method.path}`"
    return "\n".join(
        [f"# {method.stage.title}\n", path, "", "| | |", "|---|---:|", *rows, "", *notes]
    )
