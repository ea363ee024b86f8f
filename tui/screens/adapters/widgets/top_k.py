"""The likeliest next tokens of one model, or of several side by side with the differences to the first."""

from collections.abc import Sequence

from rich.cells import cell_len
from rich.text import Text
from textual.app import RenderResult
from textual.widget import Widget

from pipeline.files.text import escape_whitespace
from tui.screens.adapters.session.transcript import Answer
from tui.widgets.bars import bar, pad_or_truncate

CELL = 11  # least width of a model's column: a percentage and a difference, each with a space before it
NUMBERS = 5  # width of a percentage
LONGEST_TOKEN = 24


class TopK(Widget):
    """Rows are tokens, columns are models. Probabilities are percent, differences percentage points."""

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
    """Every token that is among the likeliest of some model, by its largest probability."""
    largest: dict[str, float] = {}
    for answer in answers:
        for token, probability in answer.top_k:
            largest[token] = max(largest.get(token, 0.0), probability)
    return sorted(largest, key=lambda token: -largest[token])


def table(answers: Sequence[Answer], width: int) -> Text:
    """As many models beside one another as fit in `width` cells, the others below."""
    rows = tokens(answers)
    if not rows:
        return Text()
    first = min(max(map(cell_len, ("next", *map(escape_whitespace, rows)))), LONGEST_TOKEN) + 1
    fits = max((width - first) // CELL, 1)
    reference = next(answer for answer in answers if answer.top_k)
    blocks = [answers[start : start + fits] for start in range(0, len(answers), fits)]
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
        return Text("not in it".ljust(width), "dim")
    text = Text(f"{percent(probability):>{NUMBERS}}")
    if answer is not reference:
        text.append_text(_difference(probability, reference.of.get(token)))
    elif len(answer.of) and width < 2 * CELL:
        return _padded(text, width)
    room = width - text.cell_len - 2
    seen = probability if probability >= 0.0005 else 0.0  # what rounds to 0.0 has no bar
    text.append(" " + bar(seen, room) if room >= 4 else "", "dim")
    return _padded(text, width)


def _difference(probability: float, before: float | None) -> Text:
    """In percentage points, with its sign: nothing is said by colour alone."""
    if before is None:
        return Text("   new", "green")
    points = 100 * (probability - before)
    shown = f"{points:+.1f}" if abs(points) < 99.95 else f"{points:+.0f}"
    if shown in ("+0.0", "-0.0"):
        return Text("     =", "dim")
    return Text(f"{shown:>6}", "green" if points > 0 else "red")


def percent(probability: float) -> str:
    """97.3, or 100 for what rounds to it."""
    return f"{100 * probability:.1f}" if probability < 0.9995 else "100"


def _padded(text: Text, width: int) -> Text:
    text.pad_right(max(width - text.cell_len, 0))
    return text
