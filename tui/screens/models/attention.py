"""The dialogs of the adapters screen: attention weights (`a`, §2.1)."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, ClassVar

from rich.cells import cell_len
from rich.text import Text
from textual import work
from textual.app import ComposeResult, RenderResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.events import Click
from textual.screen import ModalScreen
from textual.widget import Widget
from textual.widgets import Static

from pipeline.errors import UserError
from pipeline.files.text import escape_whitespace
from tui.services.loaded_models import Latest
from tui.widgets.text import bar, pad_or_truncate, shade

NUMBERS, SHADES = 6, 2  # cells per weight in the matrix: " 0.45 ", "▓▓"
MAX_NAME = 12  # cells of a token's name in the matrix
BAR = 20
SENTENCE, BARS = 12, 24  # tokens with the largest weights in the line and as bars; the rest is summed
KEYS = "←→ head · ↑↓ layer · tab token · esc closes"
Weights = Sequence[Sequence[float]]  # (T, T): row t has the weights of token t and sums to 1


class AttentionView(Widget):
    """Attention of one head: the weights of the chosen token, and the matrix. A click on a row chooses its token."""

    DEFAULT_CSS = "AttentionView { height: auto; width: 1fr; }"

    def __init__(self) -> None:
        super().__init__()
        self._tokens: list[str] = []
        self._weights: Weights = ()
        self._token: int | None = None  # None: the last one

    def show(self, tokens: Sequence[str], weights: Weights) -> None:
        self._tokens, self._weights = list(map(escape_whitespace, tokens)), weights
        self.refresh(layout=True)

    @property
    def _shown(self) -> tuple[Sequence[str], Weights, int]:
        last = len(self._tokens) - 1
        return self._tokens, self._weights, last if self._token is None else min(self._token, last)

    def step(self, by: int) -> None:
        """Choose the next token, or the one before."""
        if self._tokens:
            self._choose((self._shown[2] + by) % len(self._tokens))

    def _choose(self, token: int) -> None:
        self._token = token
        self.refresh(layout=True)

    def render(self) -> RenderResult:
        if not self._tokens:
            return Text("asking…", "dim")
        rows = matrix(*self._shown, self.size.width)
        return Text("\n").join([sentence(*self._shown), *bars(*self._shown), Text(), *rows])

    def on_click(self, event: Click) -> None:
        if self._tokens:
            start, stop = window(self._tokens, self._shown[2], self.size.width)
            # Above the first row of the matrix: the sentence, the bars, an empty line and the header.
            above = len(sentence(*self._shown).wrap(self.app.console, max(self.size.width, 1)))
            row = start + event.y - above - len(bars(*self._shown)) - 2
            if start <= row < stop:
                self._choose(row)


def sentence(tokens: Sequence[str], weights: Weights, token: int) -> Text:
    """`dem attends to: katze 0.45 · sitzt 0.30`"""
    heaviest, rest = _ranked(weights, token, SENTENCE)
    parts = [f"{tokens[other]} {weight:.2f}" for other, weight in heaviest]
    return Text.assemble((tokens[token], "bold"), " attends to: ", " · ".join([*parts, *rest]))


def bars(tokens: Sequence[str], weights: Weights, token: int) -> list[Text]:
    """A bar for each of the largest weights."""
    heaviest, rest = _ranked(weights, token, BARS)
    width = max(cell_len(tokens[other]) for other, _ in heaviest)
    lines = [
        Text.assemble(f"  {pad_or_truncate(tokens[other], width)} {weight:.2f} ", (bar(weight, BAR), "dim"))
        for other, weight in heaviest
    ]
    return lines + [Text(f"  {others}", "dim") for others in rest]


def _ranked(weights: Weights, token: int, most: int) -> tuple[list[tuple[int, float]], list[str]]:
    """(token, weight) of the tokens that `token` can see, largest weight first; the sum of those after `most`."""
    ranked = sorted(enumerate(weights[token][: token + 1]), key=lambda pair: -pair[1])
    others = [weight for _, weight in ranked[most:]]
    return ranked[:most], [f"{len(others)} others {sum(others):.2f}"] if others else []


def window(tokens: Sequence[str], token: int, width: int) -> tuple[int, int]:
    """The range of tokens shown in the matrix: all if they fit, else those up to `token`, or the first ones."""
    count = max(width - _margin(tokens), 1)
    stop = min(max(token + 1, count), len(tokens))
    return max(stop - count, 0), stop


def _margin(tokens: Sequence[str]) -> int:
    """Cells before the first column: the name, and the mark of the chosen row."""
    return min(max(map(cell_len, tokens)), MAX_NAME) + 3


def matrix(tokens: Sequence[str], weights: Weights, token: int, width: int) -> list[Text]:
    """A row per token, a column per token that it attends to: numbers if they fit, else shades.

    If not all tokens fit, those of `window`.
    """
    first, (start, stop) = _margin(tokens), window(tokens, token, width)
    cell = next((cell for cell in (NUMBERS, SHADES) if first + cell * (stop - start) <= width), 1)
    header = ""
    if stop - start < len(tokens):
        header = f"tokens {start + 1} to {stop} of {len(tokens)}"
    elif cell == NUMBERS:  # names right-aligned over the numbers
        names = [pad_or_truncate(name, min(cell_len(name), cell - 1)) for name in tokens]
        header = "".join(" " * (cell - 1 - cell_len(name)) + name + " " for name in names)
    lines = [Text(" " * first + header, "dim", no_wrap=True)]
    for row in range(start, stop):
        seen = weights[row][start : row + 1]
        cells = (f"{shade(w)}{w:.2f} " if cell == NUMBERS else shade(w) * cell for w in seen)
        name = ("▸ " if row == token else "  ") + pad_or_truncate(tokens[row], first - 3) + " "
        lines.append(Text(name + "".join(cells), "bold" if row == token else "", no_wrap=True))
    return lines


class AttentionScreen(ModalScreen[None]):
    """Shows a head's attention; keys choose layer, head and token. `ask(layer, head)` returns its weights."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,a,q", "dismiss", "Close"),
        Binding("left", "head(-1)", "Head before"),
        Binding("right", "head(1)", "Next head"),
        # Priority, as the scrolled text would take the arrows, and the screen Tab.
        Binding("up", "layer(-1)", "Layer below", priority=True),
        Binding("down", "layer(1)", "Layer above", priority=True),
        Binding("tab", "token(1)", "Next token", priority=True),
        Binding("shift+tab", "token(-1)", "Token before", priority=True),
    ]
    DEFAULT_CSS = "AttentionScreen { align: center middle; } AttentionScreen .dialog { width: 96%; max-width: 160; }"

    def __init__(self, title: str, ask: Callable[[int, int], Awaitable[dict[str, Any]]]) -> None:
        super().__init__()
        self._title, self._ask = title, ask
        self._layer, self._layers, self._head, self._heads = 0, 1, 0, 1
        self._line, self._view = Static(id="head", markup=False), AttentionView()
        self._latest = Latest(self._fetch)  # keys may be faster than the engine: it is asked for the last head only

    def compose(self) -> ComposeResult:
        yield VerticalScroll(self._line, self._view, classes="dialog")

    def on_mount(self) -> None:
        self._show_position()
        self._load()

    @work
    async def _load(self) -> None:
        await self._latest.run()

    async def _fetch(self) -> None:
        try:
            attention = await self._ask(self._layer, self._head)
        except UserError as error:
            self._line.update(f"✗ {error}")
            self._view.display = False
        else:
            self._layers, self._heads = attention["layers"], attention["heads"]
            self._show_position()
            self._view.show(attention["tokens"], attention["weights"])
            self._view.display = True

    def _show_position(self) -> None:
        position = f"layer {self._layer + 1} of {self._layers} · head {self._head + 1} of {self._heads}"
        self._line.update(f"{self._title} · {position}\n{KEYS}\n")

    def action_head(self, by: int) -> None:
        self._head = (self._head + by) % self._heads
        self._load()

    def action_layer(self, by: int) -> None:
        self._layer = (self._layer + by) % self._layers
        self._load()

    def action_token(self, by: int) -> None:
        self._view.step(by)
