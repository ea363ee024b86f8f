"""The field in which a message is typed. It grows to several lines; Enter sends."""

from collections.abc import Sequence
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.events import Key
from textual.widgets import TextArea

SCREEN_KEYS = ("f6", "f7")  # a TextArea selects with these; here they show screens


class MessageField(TextArea):
    """Enter sends, Ctrl+J begins a line; ↑ in the first line goes to the history, or to `earlier`
    prompts while there is none.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "screen.send", "Ask", id="chat.ask"),
        Binding("ctrl+j,alt+enter,shift+enter", "new_line", "New line", id="chat.newline"),
        Binding("up", "up", "history", show=False),
        Binding("down", "down", "later prompt", show=False),
        Binding("pageup", "screen.page(-1)", "history up", show=False),
        Binding("pagedown", "screen.page(1)", "history down", show=False),
    ]

    def __init__(self) -> None:
        super().__init__(
            compact=True,
            placeholder="a message; ↑ goes to the history",
            highlight_cursor_line=False,
        )
        self.cursor_blink = False  # half a percent of a core, and a frame over SSH each half second
        self.earlier: Sequence[str] = ()  # prompts, the newest last
        self._back = 0  # position among them: 0 is the draft, 1 the newest
        self._draft = ""
        for key in SCREEN_KEYS:
            self._bindings.key_to_bindings.pop(key, None)

    async def _on_key(self, event: Key) -> None:
        if event.key == "enter":
            event.prevent_default()  # of TextArea, which would begin a line: its binding sends

    def fill(self, text: str) -> None:
        """Put a text into the field, the cursor behind it."""
        self._back = 0
        self._put(text)

    def _put(self, text: str) -> None:
        self.text = text
        self.move_cursor(self.document.end)

    def action_new_line(self) -> None:
        self.insert("\n")

    async def action_up(self) -> None:
        if not self.cursor_at_first_line:
            self.action_cursor_up()
        elif self.earlier:
            self._recall(1)
        else:
            await self.run_action("screen.to_history")

    def action_down(self) -> None:
        if self._back and self.cursor_at_last_line:
            self._recall(-1)
        else:
            self.action_cursor_down()

    def _recall(self, by: int) -> None:
        """Step through the earlier prompts; below the newest the draft comes back."""
        back = self._back + by
        if 0 <= back <= len(self.earlier):
            self._draft = self._draft if self._back else self.text
            self._back = back
            self._put(self.earlier[-back] if back else self._draft)
