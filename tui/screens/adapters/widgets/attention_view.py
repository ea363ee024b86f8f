"""Attention of one head: the weights of the chosen token, and the matrix."""

from collections.abc import Sequence

from rich.cells import cell_len
from rich.text import Text
from textual.app import RenderResult
from textual.events import Click
from textual.message import Message
from textual.widget import Widget

from pipeline.files.text import escape_whitespace
from tui.widgets.text import bar, pad_or_truncate, shade

NUMBERS, SHADES = 6, 2  # cells per weight in the matrix: " 0.45 ", "▓▓"
MAX_NAME = 12  # cells of a token's name in the matrix
BAR = 20
SENTENCE, BARS = 12, 24  # tokens with the largest weights in the line and as bars; the rest is summed


class AttentionView(Widget):
    """`weights` is (T, T): row t has the weights of token t and sums to 1. A click on a row chooses its token."""

    DEFAULT_CSS = "AttentionView { height: auto; width: 1fr; }"

    class Chosen(Message):
        """A token was clicked."""

        def __init__(self, token: int) -> None:
            super().__init__()
            self.token = token

    def __init__(self) -> None:
        super().__init__()
        self._tokens: list[str] = []
        self._weights: list[list[float]] = []
        self._token = 0

    def show(self, tokens: Sequence[str], weights: Sequence[Sequence[float]], token: int) -> None:
        self._tokens, self._token = list(map(escape_whitespace, tokens)), token
        self._weights = [list(row) for row in weights]
        self.refresh(layout=True)

    def render(self) -> RenderResult:
        if not self._tokens:
            return Text("asking…", "dim")
        arguments = self._tokens, self._weights, self._token
        return Text("\n").join([sentence(*arguments), *bars(*arguments), Text(), *matrix(*arguments, self.size.width)])

    def on_click(self, event: Click) -> None:
        if self._tokens:
            start, stop = window(self._tokens, self._token, self.size.width)
            row = start + event.y - self._first_row()
            if start <= row < stop:
                self.post_message(self.Chosen(row))

    def _first_row(self) -> int:
        """The line of the first row of the matrix: below the sentence, the bars, an empty line and the header."""
        arguments = self._tokens, self._weights, self._token
        above = sentence(*arguments).wrap(self.app.console, max(self.size.width, 1))
        return len(above) + len(bars(*arguments)) + 2


def ranked(weights: Sequence[float], token: int) -> list[tuple[int, float]]:
    """(token, weight) for the tokens that `token` can see, largest weight first."""
    return sorted(enumerate(weights[: token + 1]), key=lambda pair: -pair[1])


def sentence(tokens: Sequence[str], weights: Sequence[Sequence[float]], token: int) -> Text:
    """`dem attends to: katze 0.45 · sitzt 0.30`"""
    heaviest = ranked(weights[token], token)
    parts = [f"{tokens[other]} {weight:.2f}" for other, weight in heaviest[:SENTENCE]]
    parts += _format_rest(heaviest[SENTENCE:])
    return Text.assemble((tokens[token], "bold"), " attends to: ", " · ".join(parts))


def bars(tokens: Sequence[str], weights: Sequence[Sequence[float]], token: int) -> list[Text]:
    """A bar for each of the largest weights."""
    heaviest = ranked(weights[token], token)
    width = max(cell_len(tokens[other]) for other, _ in heaviest[:BARS])
    lines = [
        Text.assemble(f"  {pad_or_truncate(tokens[other], width)} {weight:.2f} ", (bar(weight, BAR), "dim"))
        for other, weight in heaviest[:BARS]
    ]
    return lines + [Text(f"  {rest}", "dim") for rest in _format_rest(heaviest[BARS:])]


def _format_rest(others: Sequence[tuple[int, float]]) -> list[str]:
    return [f"{len(others)} others {sum(weight for _, weight in others):.2f}"] if others else []


def window(tokens: Sequence[str], token: int, width: int) -> tuple[int, int]:
    """The range of tokens shown in the matrix: all if they fit, else those up to `token`, or the first ones."""
    count = max(width - _margin(tokens), 1)
    stop = min(max(token + 1, count), len(tokens))
    return max(stop - count, 0), stop


def _margin(tokens: Sequence[str]) -> int:
    """Cells before the first column: the name, and the mark of the chosen row."""
    return min(max(map(cell_len, tokens)), MAX_NAME) + 3


def matrix(tokens: Sequence[str], weights: Sequence[Sequence[float]], token: int, width: int) -> list[Text]:
    """A row per token, a column per token that it attends to: numbers if they fit, else shades.

    If not all tokens fit, those of `window`.
    """
    first, (start, stop) = _margin(tokens), window(tokens, token, width)
    cell = next((cell for cell in (NUMBERS, SHADES) if first + cell * (stop - start) <= width), 1)
    header = "".join(_format_header(name, cell) for name in tokens[start:stop]) if cell == NUMBERS else ""
    if stop - start < len(tokens):
        header = f"tokens {start + 1} to {stop} of {len(tokens)}"
    lines = [Text(" " * first + header, "dim", no_wrap=True)]
    for row in range(start, stop):
        line = Text(("▸ " if row == token else "  ") + pad_or_truncate(tokens[row], first - 3) + " ", no_wrap=True)
        line.append("".join(_format_weight(weight, cell) for weight in weights[row][start : row + 1]))
        line.stylize("bold" if row == token else "")
        lines.append(line)
    return lines


def _format_header(name: str, cell: int) -> str:
    """A column header, right-aligned over the numbers."""
    return " " * max(cell - 1 - cell_len(name), 0) + pad_or_truncate(name, min(cell_len(name), cell - 1)) + " "


def _format_weight(weight: float, cell: int) -> str:
    return f"{shade(weight)}{weight:.2f} " if cell == NUMBERS else shade(weight) * cell
