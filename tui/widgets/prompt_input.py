"""The input line for prompts, with a history."""

from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.widgets import Input


class PromptInput(Input):
    """Up and down step through `history` (newest last); the draft comes back below the newest."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "earlier", "Earlier prompt", show=False),
        Binding("down", "later", "Later prompt", show=False),
    ]

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(placeholder="a prompt; Enter asks the selected models", compact=True, id=id)
        self.history: list[str] = []
        self._back = 0  # position in the history: 0 is the draft, 1 the newest
        self._draft = ""

    def action_earlier(self) -> None:
        self._go(self._back + 1)

    def action_later(self) -> None:
        self._go(self._back - 1)

    def _go(self, back: int) -> None:
        if not 0 <= back <= len(self.history):
            return
        if self._back == 0:
            self._draft = self.value
        self._back = back
        self.value = self.history[-back] if back else self._draft
        self.cursor_position = len(self.value)

    def remember(self, history: list[str]) -> None:
        """Set the history after a prompt was sent, and go back to the draft."""
        self.history, self._back = history, 0
