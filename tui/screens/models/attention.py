"""Attention (`a`): the heads of a model, and where one of them looks."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

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
MAX_NAME = 14  # cells of a token's name
# asks the engine: for all heads, or for one
Ask = Callable[..., Awaitable[dict[str, Any]]]
Weights = Sequence[Sequence[float]]  # (T, T): row t has the weights of token t and sums to 1
HEADS = About("Heads", "How much an adapter moved each head, and where the last token looks.")
HEAD = About("Attention", "Where a token looks: the weight of each token up to it.")


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

    def __init__(self, title: str, ask: Ask) -> None:
        super().__init__()
        self._title, self._ask = title, ask
        self.heads = Table[Head](key=lambda head: (head.layer, head.number), favourite="moved")
        self.head = Text("asking…", wide=True)
        self._token = -1  # the last
        self._shown: tuple[list[str], Weights] | None = None

    def compose(self) -> ComposeResult:
        with Horizontal(classes="dialog") as dialog:
            dialog.border_title = Content(f"Attention of {self._title}")
            dialog.border_subtitle = "↑ ↓ head  ← → token  Esc close"
            yield Pane(HEADS, self.heads, id="heads")
            yield Pane(HEAD, self.head, id="head")

    def on_mount(self) -> None:
        self._read_heads()

    @work
    async def _read_heads(self) -> None:
        try:
            found = await self._ask()
        except UserError as error:
            self.head.show(f"✗ {error}")
            return
        heads = []
        for layer, maps in enumerate(found["maps"]):
            for number, weights in enumerate(maps):
                moved = found["change"][layer][number] if found["change"] else None
                heads.append(Head(layer, number, moved, weights[-1]))
        self.heads.show(heads, COLUMNS if found["change"] else COLUMNS_OF_A_BASE)

    @on(Table.Pointed)
    def _pointed(self, event: Table.Pointed) -> None:
        self._read_head(event.row)

    @work(exclusive=True, group="head")  # keys may be faster than the engine
    async def _read_head(self, head: Head) -> None:
        try:
            found = await self._ask(layer=head.layer, head=head.number)
        except UserError as error:
            self.head.show(f"✗ {error}")
            return
        self._shown = [*map(escape_whitespace, found["tokens"])], found["weights"]
        pane = self.query_one("#head", Pane)
        pane.show_title(title=f"layer {head.layer + 1}, head {head.number + 1}")
        self._show()

    def action_token(self, by: int) -> None:
        self._token += by
        self._show()

    def _show(self) -> None:
        if self._shown:
            tokens, weights = self._shown
            token = self._token % len(tokens)
            lines = looks(tokens, weights[token], token)
            self.head.show(lambda _: lines, again=True)


COLUMNS = [
    Column[Head]("layer", lambda head: str(head.layer + 1), lambda head: head.layer),
    Column[Head]("head", lambda head: str(head.number + 1), lambda head: head.number),
    Column[Head]("moved", lambda head: _moved(head), lambda head: head.moved, largest_first=True),
    Column[Head]("last token looks at", lambda head: "".join(map(shade, head.last))),
]
COLUMNS_OF_A_BASE = [column for column in COLUMNS if column.title != "moved"]


def _moved(head: Head) -> str:
    share = head.moved or 0.0
    return f"{bar(share, MOVED)} {share:.0%}"


def looks(tokens: Sequence[str], weights: Sequence[float], token: int) -> list[Content]:
    """`dem looks at`, and a bar for each token up to it."""
    lines = [Content.assemble((tokens[token], "bold"), " looks at")]
    for name, weight in zip(tokens[: token + 1], weights, strict=False):
        lines.append(
            Content(f"  {pad_or_truncate(name, MAX_NAME)} {weight:.2f} {bar(weight, BAR)}")
        )
    return lines
