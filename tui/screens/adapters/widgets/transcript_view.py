"""The questions and answers of this session before the one that is shown above."""

from collections.abc import Sequence

from rich.text import Text
from textual.widgets import Static

from tui.screens.adapters.session.transcript import Exchange

SHOWN = 50  # the others are in the transcript


class ExchangeLog(Static):
    """Newest first, short: the prompt, then a line a model."""

    DEFAULT_CSS = "ExchangeLog { height: auto; margin-top: 1; }"

    def show(self, exchanges: Sequence[Exchange]) -> None:
        """`exchanges` are in the order in which they were asked."""
        text = Text()
        for exchange in list(exchanges)[: -SHOWN - 1 : -1]:
            text.append(f"› {exchange.prompt}", "bold")
            text.append(f"  {exchange.sampling}\n", "dim")
            for answer in exchange.answers:
                text.append(f"  {answer.title}  ", "dim")
                text.append(" ".join(answer.text.split()) or answer.error or answer.ended or "–")
                text.append("\n")
        self.update(Text.assemble(("earlier\n", "dim"), text) if exchanges else "")
