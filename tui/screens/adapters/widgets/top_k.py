"""The most likely next tokens of one or more models, with differences to the first model."""

from collections.abc import Sequence

from rich.cells import cell_len
from rich.text import Text
from textual.app import RenderResult
from textual.widget import Widget

from pipeline.files.text import escape_whitespace
from tui.screens.adapters.session.transcript import Answer
from tui.widgets.text import bar, pad_or_truncate

CELL = 11  # minimum width of a model's column: a percentage and a difference, each after a space
PERCENT_WIDTH = 5  # width of a percentage
MAX_TOKEN = 24  # cells


class TopK(Widget):
    """Rows are tokens, columns are models. Probabilities in percent, differences in percentage points."""

    DEFAULT_CSS = "TopK { height: auto; }"

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._answers: list[Answer] = []

    def show(self, answers: Sequence[Answer]) -> None:
        self._answers = list(answers)
        self.refresh(layout=True)

    def render(self) -> RenderResult:
        return table(self._answers, self.size.width or 80)


def tokens(answers: Sequence[Answer]) -> list[str]:
    """Every token in the top k of any model, sorted by its largest probability."""
    largest: dict[str, float] = {}
    for answer in answers:
        for token, probability in answer.top_k:
            largest[token] = max(largest.get(token, 0.0), probability)
    return sorted(largest, key=lambda token: -largest[token])


def table(answers: Sequence[Answer], width: int) -> Text:
    """The table: as many models side by side as fit in `width` cells, the others below."""
    rows = tokens(answers)
    if not rows:
        return Text()
    first = min(max(map(cell_len, ("next", *map(escape_whitespace, rows)))), MAX_TOKEN) + 1
    columns = max((width - first) // CELL, 1)
    reference = next(answer for answer in answers if answer.top_k)
    blocks = [answers[start : start + columns] for start in range(0, len(answers), columns)]
    return Text("\n\n").join(_block(rows, block, reference, first, width) for block in blocks)


def _block(rows: Sequence[str], answers: Sequence[Answer], reference: Answer, first: int, width: int) -> Text:
    cell = (width - first) // len(answers)
    text = Text(no_wrap=True, overflow="ellipsis")
    text.append("next".ljust(first), "dim")
    for answer in answers:
        text.append(pad_or_truncate(answer.title, cell - 1) + " ", "bold")
    for token in rows:
        text.append("\n" + pad_or_truncate(escape_whitespace(token), first - 1) + " ")
        for answer in answers:
            text.append_text(_cell(token, answer, reference, cell))
    return text


def _cell(token: str, answer: Answer, reference: Answer, width: int) -> Text:
    probability = answer.of.get(token)
    if not answer.top_k:
        return Text("no answer".ljust(width), "dim")
    if probability is None:
        return Text("unknown".ljust(width), "dim")
    text = Text(f"{percent(probability):>{PERCENT_WIDTH}}")
    if answer is not reference:
        text.append_text(_format_difference(probability, reference.of.get(token)))
    elif len(answer.of) and width < 2 * CELL:
        return _pad(text, width)
    bar_width = width - text.cell_len - 2
    visible = probability if probability >= 0.0005 else 0.0  # no bar if it rounds to 0.0
    text.append(" " + bar(visible, bar_width) if bar_width >= 4 else "", "dim")
    return _pad(text, width)


def _format_difference(probability: float, before: float | None) -> Text:
    """The difference in percentage points, with its sign: colour is not the only cue."""
    if before is None:
        return Text("   new", "green")
    points = 100 * (probability - before)
    text = f"{points:+.1f}" if abs(points) < 99.95 else f"{points:+.0f}"
    if text in ("+0.0", "-0.0"):
        return Text("     =", "dim")
    return Text(f"{text:>6}", "green" if points > 0 else "red")


def percent(probability: float) -> str:
    """97.3, or 100 if it rounds to 100.0."""
    return f"{100 * probability:.1f}" if probability < 0.9995 else "100"


def _pad(text: Text, width: int) -> Text:
    text.pad_right(max(width - text.cell_len, 0))
    return text
