"""The field in which a message is typed. It grows to several lines; Enter sends."""

from dataclasses import dataclass
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.events import Key
from textual.message import Message
from textual.widgets import TextArea

SCREEN_KEYS = ("f6", "f7")  # a TextArea selects with these; here they show screens


class MessageField(TextArea):
    """Enter sends, Ctrl+J begins a line; ↑ in the first line goes to the history."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "send", "ask", id="chat.ask"),
        Binding("ctrl+j,alt+enter,shift+enter", "new_line", "new line", id="chat.newline", key_display="^j"),
        Binding("up", "up", "history", show=False),
        Binding("pageup", "page(-1)", "history up", show=False),
        Binding("pagedown", "page(1)", "history down", show=False),
    ]

    @dataclass
    class Sent(Message):
        """Enter was pressed."""

        text: str

    class Left(Message):
        """The cursor left the field at its top."""

    @dataclass
    class Paged(Message):
        """The history is to be scrolled by pages."""

        by: int

    def __init__(self) -> None:
        super().__init__(compact=True, placeholder="a message; ↑ goes to the history", highlight_cursor_line=False)
        for key in SCREEN_KEYS:
            self._bindings.key_to_bindings.pop(key, None)

    async def _on_key(self, event: Key) -> None:
        if event.key == "enter":
            event.prevent_default()  # of TextArea, which would begin a line: its binding sends

    def action_send(self) -> None:
        self.post_message(self.Sent(self.text))

    def action_new_line(self) -> None:
        self.insert("\n")

    def action_up(self) -> None:
        if self.cursor_at_first_line:
            self.post_message(self.Left())
        else:
            self.action_cursor_up()

    def action_page(self, by: int) -> None:
        self.post_message(self.Paged(by))
