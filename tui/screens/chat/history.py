"""The history: the turns of a conversation as lines. Only those that are visible are drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from textual.binding import Binding, BindingType
from textual.events import Click, Resize
from textual.geometry import Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.selection import Selection
from textual.strip import Strip

from tui.screens.chat.lines import Line, Showing, TurnView
from tui.screens.chat.talk import Talk, Turn
from tui.screens.chat.thoughts import WrappedText
from tui.widgets.pane import Pane

GUTTER = 2  # cells left of the lines, with the cursor's bar
KINDS = ("role", "name", "message", "text", "thought", "warning", "error", "branch")


@dataclass(frozen=True)
class Stop:
    """What the cursor is on: a message of the user, or the reply to it."""

    turn: Turn
    is_reply: bool


class History(ScrollView, can_focus=True, inherit_bindings=False):
    """Arrows move between messages and replies; ← → show their other branches."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {f"history--{kind}" for kind in (*KINDS, "cursor")}
    DEFAULT_CSS = """
    History {
        height: 1fr; background: transparent; overflow-x: hidden; scrollbar-gutter: stable; scrollbar-size-vertical: 1;
        & > .history--role, & > .history--thought { color: $text-muted; }
        & > .history--name, & > .history--cursor { color: $accent; text-style: bold; }
        & > .history--message { text-style: bold; }
        & > .history--text { color: $foreground; }
        & > .history--warning { color: $text-warning; }
        & > .history--error { color: $text-error; }
        & > .history--branch { color: $text-accent; }
    }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "open", "Edit, correct", id="chat.edit"),
        Binding("left", "branch(-1)", "Branches", id="chat.branch_before", key_display="← →"),
        Binding("right", "branch(1)", "Next branch", id="chat.branch_next", show=False),
        Binding("up,k", "move(-1)", "Message above", show=False),
        Binding("down,j", "move(1)", "Message below", show=False),
        Binding("pageup", "page_up", "Page up", show=False),
        Binding("pagedown", "page_down", "Page down", show=False),
        Binding("home,g", "first", "First message", show=False),
        Binding("end,G", "last", "Last message", show=False),
        Binding("y", "copy", "Copy", id="chat.copy"),
        Binding("tab", "app.focus_next", "Message", id="chat.message"),
    ]

    @dataclass
    class Opened(Message):
        """Enter was pressed on a message or a reply."""

        on: Stop

    class Switched(Message):
        """Another branch is to be shown."""

    class Left(Message):
        """The cursor left the history below its end."""

    @dataclass
    class Copied(Message):
        """A text was copied."""

        text: str

    def __init__(self) -> None:
        super().__init__()
        self.empty = ""  # the text that is shown while there is no message
        self._views: list[TurnView] = []
        self._starts: list[int] = []  # line of each turn
        self._showing = Showing()
        self._turns: Sequence[Turn] = ()
        self.stop: Stop | None = None
        self._name_styles: dict[str, str] = {}

    def show(self, talk: Talk, showing: Showing, name_styles: dict[str, str]) -> None:
        """Show the conversation. `name_styles`: model → colour of its name. At the end, stay at the
        end.
        """
        self._turns, self._showing, self._name_styles = talk.turns, showing, name_styles
        if self.stop and self.stop.turn not in self._turns:
            self.stop = Stop(self._turns[-1], self.stop.is_reply) if self._turns else None
        self._lay_out()

    def _lay_out(self) -> None:
        width = self.scrollable_content_region.width - GUTTER
        if width < 1:
            return
        before = {id(view.turn): view for view in self._views}
        last = len(self._turns) - 1
        views, lines = list[TurnView](), 0
        self._starts = []
        for number, turn in enumerate(self._turns):
            view = before.get(id(turn))
            if view is None or not view.shows(turn, width, number == last):
                view = TurnView(turn, width, number == last)
            view.update(self._showing)
            views.append(view)
            self._starts.append(lines)
            lines += view.height
        self._views = views
        at_end = self.is_vertical_scroll_end
        self.virtual_size = Size(self.scrollable_content_region.width, lines)
        if at_end:
            self.scroll_end(animate=False, immediate=True, force=True)
        self.refresh()

    def grew(self) -> None:
        """The last turn has new text: read what arrived, and draw the visible lines that
        changed.
        """
        if not self._views:
            return
        view, start = self._views[-1], self._starts[-1]
        at_end, offset = self.is_vertical_scroll_end, self.scroll_offset.y
        first = max(offset - start, 0)
        before = [view.line(n) for n in range(first, first + self.size.height)]
        view.update(self._showing)
        lines = start + view.height
        if lines != self.virtual_size.height:
            self.virtual_size = Size(self.virtual_size.width, lines)
            if at_end:
                self.scroll_end(animate=False, immediate=True, force=True)
        if self.scroll_offset.y != offset:
            self.refresh()
            return
        for n, line in enumerate(before, first):
            if view.line(n) != line:
                self.refresh_line(start + n)

    def on_resize(self, _: Resize) -> None:
        self._lay_out()

    # drawing

    def render_line(self, y: int) -> Strip:
        width, style = self.size.width, self.rich_style
        line = y + self.scroll_offset.y
        index = self._view_at(line)
        if index is None:
            lines = () if self._turns else WrappedText(width - GUTTER, self.empty).lines
            text = " " * GUTTER + lines[line] if line < len(lines) else ""
            segment = Segment(text, self.get_component_rich_style("history--role"))
            return Strip([segment]).adjust_cell_length(width).apply_style(style)
        view, within = self._views[index], line - self._starts[index]
        parts = view.line(within)
        segments = [self._gutter(view, within)]
        for part in parts:
            part_style = self.get_component_rich_style(f"history--{part.kind}")
            if colour := self._name_styles.get(part.model) if part.model else None:
                part_style += Style.parse(colour)
            segments.append(Segment(part.text, part_style))
        return Strip(segments).adjust_cell_length(width).apply_style(style).apply_offsets(0, line)

    def _gutter(self, view: TurnView, within: int) -> Segment:
        is_reply = within >= view.message_height
        chosen = (
            self.has_focus and self.stop == Stop(view.turn, is_reply) and within < view.height - 1
        )
        if chosen:
            return Segment("▌ ", self.get_component_rich_style("history--cursor"))
        return Segment("  ")

    def _view_at(self, line: int) -> int | None:
        if not 0 <= line < self.virtual_size.height or not self._views:
            return None
        low, high = 0, len(self._starts) - 1
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._starts[middle] <= line else (low, middle - 1)
        return low

    def get_selection(self, selection: Selection) -> tuple[str, str] | None:
        """The text that is selected with the mouse."""
        lines = (
            " " * GUTTER + _plain(view.line(n)) for view in self._views for n in range(view.height)
        )
        return selection.extract("\n".join(lines)), "\n"

    # the cursor

    @property
    def _stops(self) -> list[Stop]:
        return [Stop(turn, is_reply) for turn in self._turns for is_reply in (False, True)]

    def point(self, stop: Stop | None) -> None:
        """Put the cursor on a message or a reply, and show it."""
        self.stop = stop
        if stop is not None:
            index = list(self._turns).index(stop.turn)
            view, start = self._views[index], self._starts[index]
            top = start + view.message_height if stop.is_reply else start
            bottom = start + view.height - 1 if stop.is_reply else start + view.message_height
            height, offset = self.size.height, self.scroll_offset.y
            if top < offset or bottom - top > height:
                self.scroll_to(y=top, animate=False)
            elif bottom > offset + height:
                self.scroll_to(y=bottom - height, animate=False)
        self.refresh()

    def point_last(self) -> None:
        """Put the cursor on the last message of the user."""
        if self._turns:
            self.point(Stop(self._turns[-1], False))

    def action_move(self, by: int) -> None:
        stops = self._stops
        if self.stop not in stops:
            self.point_last()
            return
        index = stops.index(self.stop) + by
        if index >= len(stops):
            self.post_message(self.Left())
        elif index >= 0:
            self.point(stops[index])

    def action_first(self) -> None:
        if self._turns:
            self.point(self._stops[0])

    def action_last(self) -> None:
        if self._turns:
            self.point(self._stops[-1])

    def action_open(self) -> None:
        if self.stop:
            self.post_message(self.Opened(self.stop))

    def action_branch(self, by: int) -> None:
        if self.stop is None:
            return
        branches = self.stop.turn.replies if self.stop.is_reply else self.stop.turn.siblings
        if branches.step(by):
            self.stop = (
                self.stop if self.stop.is_reply else Stop(self.stop.turn.siblings.shown, False)
            )
            self.post_message(self.Switched())

    def action_copy(self) -> None:
        if self.stop:
            answers = self.stop.turn.reply.answers
            texts = (
                [answer.content.strip() for answer in answers]
                if self.stop.is_reply
                else [self.stop.turn.text]
            )
            self.post_message(self.Copied("\n\n".join(texts)))

    def on_click(self, event: Click) -> None:
        line = event.y + self.scroll_offset.y
        if (index := self._view_at(line)) is not None:
            view = self._views[index]
            self.point(Stop(view.turn, line - self._starts[index] >= view.message_height))

    def on_focus(self) -> None:
        if self.stop is None:
            self.point_last()


def _plain(line: Line) -> str:
    return "".join(part.text for part in line)


class HistoryPane(Pane):
    """The conversation."""

    TITLE = "Chat"
    HELP = """\
The messages and the answers, newest last. With two models, each reads the messages and *its own*
answers.

- `▌` is the cursor: ↑ ↓ move it, Enter edits the message it is on (the former one stays as a
  branch), or takes the answer it is on to the data, to be corrected
- `‹ 2/3 ›` is the second of three branches; ← → show the others, with all that followed
- `▸ thoughts` are folded; Ctrl+T shows them. Thoughts are not part of what the model reads in
  later turns
- `◌` waits, `◐` writes, `▪` was interrupted, `…` reached the limit, `✗` failed
- *tokens/s* counts from the first token on; reading the prompt is not part of it
- yellow text tells what no longer fitted into the model's window and was left out, or that an
  answer was given at another strength than the one that is set"""
