"""The newest exchange as a table and as text, with earlier ones below."""

from collections.abc import Sequence

from textual.app import ComposeResult
from textual.containers import VerticalScroll

from tui.screens.adapters.session.transcript import Answer, Exchange
from tui.screens.adapters.widgets.streaming import Completions
from tui.screens.adapters.widgets.top_k import TopK
from tui.screens.adapters.widgets.transcript_view import ExchangeLog


class Answers(VerticalScroll):
    """Scrollable answers. The widgets are attributes, as answers can arrive while the screen closes."""

    DEFAULT_CSS = """
    Answers { height: 1fr; margin-top: 1; scrollbar-size-vertical: 1; }
    Answers:focus { background-tint: $foreground 3%; }
    Answers Completions { margin-top: 1; }
    """

    def __init__(self) -> None:
        super().__init__()
        self._top_k, self._completions, self._log = TopK(), Completions(), ExchangeLog()

    def compose(self) -> ComposeResult:
        yield self._top_k
        yield self._completions
        yield self._log

    async def start(self, exchange: Exchange, earlier: Sequence[Exchange]) -> None:
        """Show a new exchange, without answers yet."""
        self._log.show(earlier)
        self._top_k.show([])
        await self._completions.start(exchange)

    def show(self, exchange: Exchange) -> None:
        """Update the shown answers."""
        self.show_table(exchange.answers)
        self._completions.show(exchange)

    def show_table(self, answers: Sequence[Answer]) -> None:
        self._top_k.show(answers)
