"""What one head attends to: a line for the chosen token, and the whole matrix."""

from collections.abc import Sequence

from rich.text import Text
from textual.app import RenderResult
from textual.events import Click
from textual.message import Message
from textual.widget import Widget

from tui.widgets.bars import bar, shade
from tui.widgets.top_k import visible

NUMBERS, SHADES = 6, 2  # cells a weight takes in the matrix: " 0.45 ", "▓▓"
LONGEST = 12  # cells of a token's name in the matrix
BAR = 20


class AttentionView(Widget):
    """Row t of `weights` is what token t attends to; rows sum to 1. A click on a row chooses its token."""

    DEFAULT_CSS = "AttentionView { height: auto; width: 1fr; }"

    class Chosen(Message):
        """Another token was clicked."""

        def __init__(self, token: int) -> None:
            super().__init__()
            self.token = token

    def __init__(self) -> None:
        super().__init__()
        self._tokens: list[str] = []
        self._weights: list[list[float]] = []
        self._token = 0

    def show(self, tokens: Sequence[str], weights: Sequence[Sequence[float]], token: int) -> None:
        self._tokens, self._token = list(map(visible, tokens)), token
        self._weights = [list(row) for row in weights]
        self.refresh(layout=True)

    def render(self) -> RenderResult:
        if not self._tokens:
            return Text("asking…", "dim")
        lines = [sentence(self._tokens, self._weights, self._token), *bars(self._tokens, self._weights, self._token)]
        return Text("\n").join([*lines, Text(), *matrix(self._tokens, self._weights, self._token, self.size.width)])

    def on_click(self, event: Click) -> None:
        row = event.y - self._first_row()
        if 0 <= row < len(self._tokens):
            self.post_message(self.Chosen(row))

    def _first_row(self) -> int:
        """The line of the matrix's first row: below the sentence, a bar a token, an empty line and the header."""
        above = sentence(self._tokens, self._weights, self._token) if self._tokens else Text()
        return len(above.wrap(self.app.console, max(self.size.width, 1))) + self._token + 3


def ranked(weights: Sequence[float], token: int) -> list[tuple[int, float]]:
    """Those that `token` can see, the heaviest first."""
    return sorted(enumerate(weights[: token + 1]), key=lambda pair: -pair[1])


def sentence(tokens: Sequence[str], weights: Sequence[Sequence[float]], token: int) -> Text:
    """`dem attends to: katze 0.45 · sitzt 0.30`"""
    parts = " · ".join(f"{tokens[other]} {weight:.2f}" for other, weight in ranked(weights[token], token))
    return Text.assemble((tokens[token], "bold"), " attends to: ", parts)


def bars(tokens: Sequence[str], weights: Sequence[Sequence[float]], token: int) -> list[Text]:
    width = max(map(len, tokens))
    return [
        Text.assemble(f"  {tokens[other].ljust(width)} {weight:.2f} ", (bar(weight, BAR), "dim"))
        for other, weight in ranked(weights[token], token)
    ]


def matrix(tokens: Sequence[str], weights: Sequence[Sequence[float]], token: int, width: int) -> list[Text]:
    """A row a token, a column for each that it attends to: numbers where there is room, else shades, else nothing."""
    names = [name if len(name) <= LONGEST else name[: LONGEST - 1] + "…" for name in tokens]
    first = max(map(len, names)) + 3
    cell = next((cell for cell in (NUMBERS, SHADES, 1) if first + cell * len(tokens) <= width), 0)
    if not cell:
        return [Text(f"The matrix of {len(tokens)} tokens needs {first + len(tokens)} columns.", "dim")]
    header = "".join(name[: cell - 1].rjust(cell - 1) + " " for name in names) if cell > 1 else ""
    lines = [Text(" " * first + header, "dim", no_wrap=True)]
    for row, name in enumerate(names):
        line = Text(("▸ " if row == token else "  ") + name.ljust(first - 2), no_wrap=True)
        line.append("".join(_weight(weight, cell) for weight in weights[row][: row + 1]))
        line.stylize("bold" if row == token else "")
        lines.append(line)
    return lines


def _weight(weight: float, cell: int) -> str:
    return f"{shade(weight)}{weight:.2f} " if cell == NUMBERS else shade(weight) * cell
