"""Attention (`a`): the heads of a model, and where one of them looks: the adapter, and its base."""

from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.content import Content
from textual.screen import ModalScreen

from pipeline.errors import UserError
from pipeline.files.text import escape_whitespace
from tui.panes.pane import About, Pane
from tui.panes.table import Column, Table
from tui.panes.text import Text
from tui.widgets.cells import bar, pad_or_truncate, shade

BAR, MOVED = 20, 5  # cells
HEAVIEST = 8  # tokens with the largest weights, as bars; the rest is summed
MAX_NAME = 14  # cells of a token's name
Weights = Sequence[Sequence[float]]  # (T, T): row t has the weights of token t and sums to 1
HEADS = About("Heads", "How much an adapter moved each head, and where the last token looks.")
HEAD = About(
    "Attention",
    "Where a token looks, and how that differs from the base; below, a row per token: darker is more.",
)


class Ask(Protocol):
    """Asks the engine at a strength: for all heads, or for one."""

    def __call__(self, strength: float, **head: int) -> Awaitable[dict[str, Any]]: ...


@dataclass(frozen=True)
class Head:
    """A head: how much of its attention an adapter moved, and the last row of its map."""

    layer: int
    number: int
    moved: float | None
    last: Sequence[float]


class AttentionDialog(ModalScreen[None]):
    """A table of the heads; beside it the one under the cursor. ← → choose the token."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,a,q", "dismiss", "Close"),
        Binding("left", "token(-1)", "Token before", priority=True),
        Binding("right", "token(1)", "Next token", priority=True),
    ]

    def __init__(self, title: str, is_adapter: bool, strength: float, ask: Ask) -> None:
        super().__init__()
        self._title, self._is_adapter, self._strength, self._ask = title, is_adapter, strength, ask
        self.heads, self.head = Table[Head](key=_key, favourite="moved"), Text("asking…", wide=True)
        self._token = -1
        # tokens, the weights of the model, and those of its base
        self._shown: tuple[list[str], Weights, Weights | None] | None = None

    def compose(self) -> ComposeResult:
        with Horizontal(classes="dialog") as dialog:
            dialog.border_title = Content(f"Attention of {self._title}")
            dialog.border_subtitle = "↑ ↓ head  ← → token  Esc close"
            yield Pane(HEADS, self.heads, id="heads")
            yield Pane(HEAD, self.head, id="head")

    def on_mount(self) -> None:
        self.set_focus(self.heads)
        self._read_heads()

    @work
    async def _read_heads(self) -> None:
        try:
            found = await self._ask(self._strength)
        except UserError as error:
            self.head.show(f"✗ {error}")
            return
        heads = []
        for layer, maps in enumerate(found["maps"]):
            for number, weights in enumerate(maps):
                moved = found["change"][layer][number] if found["change"] else None
                heads.append(Head(layer, number, moved, weights[-1]))
        self.heads.show(heads, list(_columns(self._is_adapter)))

    @on(Table.Pointed)
    def _pointed(self, event: Table.Pointed) -> None:
        self._read_head(event.row)

    @work(exclusive=True, group="head")  # keys may be faster than the engine
    async def _read_head(self, head: Head) -> None:
        place = {"layer": head.layer, "head": head.number}
        try:
            own = await self._ask(self._strength, **place)
            base = (await self._ask(0.0, **place))["weights"] if self._is_adapter else None
        except UserError as error:
            self.head.show(f"✗ {error}")
            return
        tokens = [escape_whitespace(token) for token in own["tokens"]]
        self._shown = tokens, own["weights"], base
        pane = self.query_one("#head", Pane)
        pane.show_title(title=f"layer {head.layer + 1}, head {head.number + 1}")
        self._show()

    def action_token(self, by: int) -> None:
        if self._shown:
            count = len(self._shown[0])
            at = self._token if self._token >= 0 else count - 1
            self._token = (at + by) % count
            self._show()

    def _show(self) -> None:
        if self._shown:
            tokens, own, base = self._shown
            token = min(self._token, len(tokens) - 1)
            lines = [*bars(tokens, own, base, token), Content(""), *matrix(tokens, own, token)]
            self.head.show(lambda _: lines, again=True)


def _key(head: Head) -> tuple[int, int]:
    return head.layer, head.number


def _columns(is_adapter: bool) -> Iterator[Column[Head]]:
    yield Column("layer", lambda head: str(head.layer + 1), lambda head: head.layer)
    yield Column("head", lambda head: str(head.number + 1), lambda head: head.number)
    if is_adapter:
        yield Column("moved", _moved, lambda head: head.moved, largest_first=True)
    yield Column("last token looks at", lambda head: "".join(map(shade, head.last)))


def _moved(head: Head) -> Content:
    return Content(f"{bar(head.moved or 0.0, MOVED)} {head.moved or 0.0:.0%}")


def aligned(base: Weights, tokens: int) -> Weights:
    """The base's weights for as many tokens: virtual ones, which it does not have, are the first."""
    more = tokens - len(base)
    return [[0.0] * tokens] * more + [[0.0] * more + list(row) for row in base]


def bars(tokens: Sequence[str], own: Weights, base: Weights | None, token: int) -> list[Content]:
    """`dem looks at`, and a bar for each of the largest weights, with the base's beside it."""
    token = token if token >= 0 else len(tokens) - 1
    before = aligned(base, len(tokens))[token] if base is not None else None
    ranked = sorted(enumerate(own[token][: token + 1]), key=lambda pair: -pair[1])
    lines = [Content.assemble((tokens[token], "bold"), " looks at")]
    for other, weight in ranked[:HEAVIEST]:
        name = pad_or_truncate(tokens[other], MAX_NAME)
        line = Content(f"  {name} {weight:.2f} {bar(weight, BAR)}")
        if before is not None:
            change = weight - before[other]
            line += Content.styled(f" {change:+.2f}", "bold" if abs(change) >= 0.1 else "dim")
        lines.append(line)
    if others := [weight for _, weight in ranked[HEAVIEST:]]:
        lines.append(
            Content.styled(f"  {len(others)} others {sum(others):.2f}", "$foreground-muted")
        )
    return lines


def matrix(tokens: Sequence[str], weights: Weights, token: int) -> list[Content]:
    """A row per token, two cells per token that it looks at."""
    token = token if token >= 0 else len(tokens) - 1
    lines = []
    for number, row in enumerate(weights):
        mark = "▸" if number == token else " "
        cells = "".join(2 * shade(weight) for weight in row[: number + 1])
        text = f"{mark} {pad_or_truncate(tokens[number], MAX_NAME)} {cells}"
        lines.append(Content.styled(text, "bold" if number == token else ""))
    return lines
