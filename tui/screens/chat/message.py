"""The field in which a message is typed. It grows to several lines; Enter sends."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from rich.text import Text
from textual.binding import Binding, BindingType
from textual.events import Key
from textual.message import Message
from textual.widgets import TextArea

from tui.screens.chat.session import Session
from tui.screens.chat.talk import Turn
from tui.widgets.pane import Pane
from tui.widgets.prompting import AS_TRAINED, STRONGEST

TRACK = 11  # cells of the strength's scale
SCREEN_KEYS = ("f6", "f7")  # a TextArea selects with these; here they show screens


class MessageField(TextArea):
    """Enter sends, Ctrl+J begins a line; ↑ in the first line goes to the history."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "send", "Ask", id="chat.ask"),
        Binding("ctrl+j,alt+enter,shift+enter", "new_line", "New line", id="chat.newline"),
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
        super().__init__(
            compact=True,
            placeholder="a message; ↑ goes to the history",
            highlight_cursor_line=False,
        )
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


class MessagePane(Pane):
    """Where the message is typed; its title has models, strength, context and sampling."""

    TITLE = "Message"
    HELP = """\
Enter asks, Ctrl+J begins a new line, ↑ in the first line goes to the history.

The title: the models, the strength of adapters from 0 (the base) over 1 (as trained) to 2, the
tokens of the model's window that the last turn used, and the sampling. A model without a chat
template goes on with the text: the messages and answers are one text for it, and the system prompt
stands before them."""

    def show(
        self,
        session: Session,
        names: Sequence[Text],
        turns: Sequence[Turn],
        unknown: str,
        is_editing: bool,
    ) -> None:
        """Show what is set, the most important first: what does not fit is cut at the end.

        `names` of the models; `unknown` words of the typed text.
        """
        facts: list[str | Text] = [Text(" beside ").join(names) if names else "no model"]
        if session.models.inference.replays:
            facts.append("recorded answers")
        if session.scales:
            facts.append(f"×{session.strength:.2f} {_track(session.strength)}")
        if unknown:
            facts.append(
                Text(f"not in the vocabulary: {unknown}", self.app.theme_variables["text-warning"])
            )
        facts += [used] if (used := _window_used(turns)) else []
        facts.append(str(replace(session.sampling, k=0)).removesuffix(" · 0 candidates"))
        self.show_title(*facts, title="Edit message" if is_editing else "Message")


def _track(strength: float) -> str:
    position, middle = (round(value / STRONGEST * (TRACK - 1)) for value in (strength, AS_TRAINED))
    cells = ["━" if cell < position else "┄" for cell in range(TRACK)]
    cells[middle] = "┿" if middle < position else "┊"
    cells[position] = "●"
    return "".join(cells)


def _window_used(turns: Sequence[Turn]) -> str:
    """The part of the window that the last turn took, of the model that it filled most."""
    answers = turns[-1].reply.answers if turns else ()
    used = [
        (answer.prompt_tokens + answer.tokens, answer.window) for answer in answers if answer.window
    ]
    if not used:
        return ""
    tokens, window = max(used, key=lambda pair: pair[0] / pair[1])
    return f"context {tokens:,} of {window:,}"
