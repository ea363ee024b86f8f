"""The field in which a message is typed. It grows to several lines; Enter sends."""

from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.events import Key
from textual.widgets import TextArea

SCREEN_KEYS = ("f6", "f7")  # a TextArea selects with these; here they show screens


class MessageField(TextArea):
    """Enter sends, Ctrl+J begins a line; ↑ in the first line goes to the history."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "screen.send", "Ask", id="chat.ask"),
        Binding("ctrl+j,alt+enter,shift+enter", "new_line", "New line", id="chat.newline"),
        Binding("up", "up", "history", show=False),
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
        for key in SCREEN_KEYS:
            self._bindings.key_to_bindings.pop(key, None)

    async def _on_key(self, event: Key) -> None:
        if event.key == "enter":
            event.prevent_default()  # of TextArea, which would begin a line: its binding sends

    def fill(self, text: str) -> None:
        """Put a text into the field, the cursor behind it."""
        self.text = text
        self.move_cursor(self.document.end)

    def action_new_line(self) -> None:
        self.insert("\n")

    async def action_up(self) -> None:
        if self.cursor_at_first_line:
            await self.run_action("screen.to_history")
        else:
            self.action_cursor_up()
