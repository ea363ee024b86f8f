"""The earlier exchanges of this session."""

from collections.abc import Sequence

from rich.text import Text
from textual.widgets import Static

from tui.screens.adapters.session.transcript import Exchange

MAX_SHOWN = 50  # exchanges; the transcript has all


class ExchangeLog(Static):
    """Earlier exchanges, newest first: the prompt, then a line per model."""

    DEFAULT_CSS = "ExchangeLog { height: auto; margin-top: 1; }"

    def show(self, exchanges: Sequence[Exchange]) -> None:
        """Show `exchanges`, which are in order of time."""
        text = Text()
        for exchange in list(exchanges)[: -MAX_SHOWN - 1 : -1]:
            text.append(f"› {exchange.prompt}", "bold")
            text.append(f"  {exchange.sampling}\n", "dim")
            for answer in exchange.answers:
                text.append(f"  {answer.title}  ", "dim")
                text.append(" ".join(answer.text.split()) or answer.error or answer.ended or "–")
                text.append("\n")
        self.update(Text.assemble(("earlier\n", "dim"), text) if exchanges else "")
