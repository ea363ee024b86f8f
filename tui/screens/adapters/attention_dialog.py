"""`a`: attention weights of each head over the prompt (§2.1)."""

from collections.abc import Awaitable, Callable
from typing import Any, ClassVar

from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from pipeline.errors import UserError
from tui.screens.adapters.session.chat_session import Latest
from tui.screens.adapters.widgets.attention_view import AttentionView

Ask = Callable[[int, int], Awaitable[dict[str, Any]]]
KEYS = "←→ head · ↑↓ layer · tab token · esc closes"


class AttentionScreen(ModalScreen[None]):
    """Shows a head's attention; keys choose layer, head and token. `ask(layer, head)` returns its weights."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,a,q", "dismiss", "Close"),
        Binding("left", "head(-1)", "Head before"),
        Binding("right", "head(1)", "Next head"),
        Binding("up", "layer(-1)", "Layer below", priority=True),
        Binding("down", "layer(1)", "Layer above", priority=True),
        Binding("tab", "token(1)", "Next token", priority=True),
        Binding("shift+tab", "token(-1)", "Token before", priority=True),
    ]
    DEFAULT_CSS = "AttentionScreen { align: center middle; } AttentionScreen .dialog { width: 96%; max-width: 160; }"

    def __init__(self, title: str, ask: Ask) -> None:
        super().__init__()
        self._title, self._ask = title, ask
        self._layer = self._head = 0
        self._token: int | None = None  # None: the last one
        self._attention: dict[str, Any] = {"tokens": [], "layers": 1, "heads": 1}
        self._latest = Latest(self._fetch)

    def compose(self) -> ComposeResult:
        with VerticalScroll(classes="dialog"):
            yield Static(id="head", markup=False)
            yield AttentionView()

    def on_mount(self) -> None:
        self._show()
        self._load()

    @work
    async def _load(self) -> None:
        await self._latest.run()

    async def _fetch(self) -> None:
        try:
            self._attention = await self._ask(self._layer, self._head)
        except UserError as error:
            self.query_one("#head", Static).update(f"✗ {error}")
            self.query_one(AttentionView).display = False
            return
        self._show()

    def _show(self) -> None:
        attention = self._attention
        position = f"layer {self._layer + 1} of {attention['layers']} · head {self._head + 1} of {attention['heads']}"
        self.query_one("#head", Static).update(f"{self._title} · {position}\n{KEYS}\n")
        self.query_one(AttentionView).display = True
        if attention["tokens"]:
            self.query_one(AttentionView).show(attention["tokens"], attention["weights"], self._chosen_token())

    def _chosen_token(self) -> int:
        last = len(self._attention["tokens"]) - 1
        return last if self._token is None else min(self._token, last)

    def action_head(self, by: int) -> None:
        self._head = (self._head + by) % self._attention["heads"]
        self._load()

    def action_layer(self, by: int) -> None:
        self._layer = (self._layer + by) % self._attention["layers"]
        self._load()

    def action_token(self, by: int) -> None:
        if self._attention["tokens"]:
            self._token = (self._chosen_token() + by) % len(self._attention["tokens"])
            self._show()

    @on(AttentionView.Chosen)
    def choose(self, event: AttentionView.Chosen) -> None:
        self._token = event.token
        self._show()
