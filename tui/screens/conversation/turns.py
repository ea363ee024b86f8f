"""The turns of a conversation: a message, a table of likely next tokens, the answers side by side."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from textual.binding import Binding, BindingType
from textual.containers import ItemGrid, Vertical, VerticalScroll
from textual.content import Content
from textual.widget import Widget
from textual.widgets import Static

from pipeline.files.text import escape_whitespace, printable
from pipeline.inference.talk import Answer, Branches, State, Turn, split_thoughts
from tui.panes.lines import MUTED
from tui.panes.table import Column, Table
from tui.screens.conversation.session import Session, sign_of
from tui.widgets.cells import bar

MIN_COLUMN = 45  # cells of an answer: fewer are hard to read
MAX_TOKEN, BAR = 24, 8  # cells
TAB = "    "
# what is said of a state; of the others, which come before, their names
STATES = {
    State.WRITING: "◐ writing",
    State.INTERRUPTED: "▪ interrupted",
    State.LENGTH: "… limit reached",
    State.END: "",
    State.FAILED: "",
}


class Stop(Widget, can_focus=True):
    """What the cursor can be on: a message, or the reply to it. Its keys are the screen's."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "screen.open", "Edit, correct", id="chat.edit"),
        Binding(
            "left", "screen.branch(-1)", "Branches", id="chat.branch_before", key_display="← →"
        ),
        Binding("right", "screen.branch(1)", "Next branch", id="chat.branch_next", show=False),
        Binding("up,k", "move(-1)", "Message above", show=False),
        Binding("down,j", "move(1)", "Message below", show=False),
        Binding("y", "screen.copy", "Copy", id="chat.copy"),
        Binding("tab", "screen.to_field", "Message", id="chat.message"),
    ]

    turn: Turn
    branches: Branches[Any]  # the alternatives to it, with itself

    @property
    def text(self) -> str:
        return self.turn.text

    async def action_move(self, by: int) -> None:
        stops = list(self.screen.query(Stop))
        at = stops.index(self) + by
        if at >= len(stops):
            await self.run_action("screen.to_field")
        elif at >= 0:
            stops[at].focus()


class Said(Stop, Static):
    """A message of the user."""

    def __init__(self, turn: Turn) -> None:
        super().__init__()
        self.turn, self.branches = turn, turn.siblings

    def show(self) -> None:
        head = Content.assemble(("you  ", MUTED), (str(self.branches), "$text-accent"))
        self.update(Content("\n").join([head, Content.styled(shown(self.text), "bold")]))


class Replied(Stop, ItemGrid):
    """The answers to a message: side by side where there is room."""

    def __init__(self, turn: Turn, session: Session) -> None:
        self.texts = [Static() for _ in turn.reply.answers]
        super().__init__(*self.texts, min_column_width=MIN_COLUMN)
        self.turn, self.branches, self._session = turn, turn.replies, session

    @property
    def text(self) -> str:
        return "\n\n".join(answer.content.strip() for answer in self.turn.reply.answers)

    def show(self, is_last: bool) -> None:
        """Show what arrived."""
        branches = str(self.branches)
        for text, answer in zip(self.texts, self.turn.reply.answers, strict=True):
            text.update(answer_content(answer, branches, self._session, is_last))
            branches = ""  # they stand beside the first


class TurnView(Vertical):
    """A turn of the branch that is shown."""

    def __init__(self, turn: Turn, session: Session) -> None:
        self.said, self.replied = Said(turn), Replied(turn, session)
        self.table = Table[str](key=lambda token: token)
        super().__init__(self.said, self.table, self.replied)
        self.turn, self.reply = turn, turn.reply
        self.table.can_focus, self.table.display = False, False

    def show(self, is_last: bool) -> None:
        self.said.show()
        self.replied.show(is_last)
        self.show_table(self.reply.answers)

    def show_table(self, answers: Sequence[Answer]) -> None:
        known = [answer for answer in answers if answer.top_k]
        self.table.display = bool(known)
        if known:
            self.table.show(*next_tokens(known))


class History(VerticalScroll, can_focus=False):
    """The turns of the branch that is shown, the newest last; a sentence while there is none."""

    def __init__(self, session: Session) -> None:
        self.nothing = Static(id="nothing", markup=False)
        super().__init__(self.nothing)
        self._session = session
        self.views: list[TurnView] = []
        self._lock = asyncio.Lock()  # views come and go one time after the other

    async def show(self, turns: Sequence[Turn], empty: str) -> None:
        """Show the turns; the views of those that are shown already stay."""
        self.nothing.update(empty)
        self.nothing.display = not turns
        async with self._lock:
            at_end, same = self.is_vertical_scroll_end, 0
            for turn, view in zip(turns, self.views, strict=False):
                if (turn, turn.reply) != (view.turn, view.reply):
                    break
                same += 1
            gone = self.views[same:]
            fresh = [TurnView(turn, self._session) for turn in turns[same:]]
            self.views = self.views[:same] + fresh
            with self.app.batch_update():
                for view in gone:
                    await view.remove()
                await self.mount_all(fresh)
                for view in self.views:
                    view.show(view is self.views[-1])
            if fresh or at_end:
                self.scroll_end(animate=False)
                # and once more, as a scroll bar that comes makes texts longer
                self.call_after_refresh(self.scroll_end, animate=False)

    @property
    def last(self) -> Stop | None:
        return self.views[-1].said if self.views else None

    def grew(self) -> None:
        """The last turn has new text. At the end, stay at the end."""
        if self.views:
            at_end = self.is_vertical_scroll_end
            self.views[-1].show(is_last=True)
            if at_end:
                self.scroll_end(animate=False, immediate=False)


def shown(text: str) -> str:
    """Control characters become visible signs, tabs four spaces."""
    return printable(text.replace("\t", TAB))


def answer_content(answer: Answer, branches: str, session: Session, is_last: bool) -> Content:
    """An answer: whose, how far, what was cut, its thoughts, its text, what is wrong."""
    thoughts, text = "", answer.text
    if answer.chat:
        thoughts, text, _ = split_thoughts(text, answer.unfinished)
    parts = [_title(answer, branches, sign_of(session.asked[answer.model])[1])]
    if answer.cut_tokens:
        parts.append(Content.styled(_cut(answer), "$text-warning"))
    if thoughts:
        sign = "▾" if session.shows_thoughts else "▸"
        parts.append(Content.styled(f"{sign} thoughts  {len(thoughts.split())} words", MUTED))
    if thoughts and session.shows_thoughts:
        lines = shown(thoughts.strip()).split("\n")
        parts += [Content.styled(f"│ {line}", MUTED) for line in lines]
    if text.strip():
        parts.append(Content(shown(text.strip())))
    if answer.error:
        parts.append(Content.styled(f"✗ {shown(answer.error)}", "$text-error"))
    if is_last and answer.content and answer.strength not in (None, session.strength):
        note = f"at ×{answer.strength:.2f}; Ctrl+R asks again at ×{session.strength:.2f}"
        parts.append(Content.styled(note, "$text-warning"))
    return Content("\n").join(parts)


def _title(answer: Answer, branches: str, style: str) -> Content:
    """`lora  20 tokens · 40 tokens/s · … limit reached  ‹ 2/2 ›`"""
    name = Content.styled(answer.title, f"bold {style}")
    facts = []
    if answer.tokens or answer.state == State.END:
        facts.append(f"{answer.tokens:,} token{'s' * (answer.tokens != 1)}")
    if pace := answer.tokens_per_second:
        facts.append(f"{pace:,.0f} tokens/s" if pace >= 10 else f"{pace:.1f} tokens/s")
    if state := STATES.get(answer.state, f"◌ {answer.state}"):
        facts.append(state)
    parts = name, Content.styled(" · ".join(facts), MUTED), Content.styled(branches, "$text-accent")
    return Content("  ").join(part for part in parts if part)


def _cut(answer: Answer) -> str:
    what = f"{answer.cut_messages} messages" if answer.cut_messages else "words"
    tokens = f"{answer.cut_tokens:,} tokens"
    return f"the first {what} were left out ({tokens}): the window has {answer.window:,} tokens"


def next_tokens(answers: Sequence[Answer]) -> tuple[list[str], list[Column[str]]]:
    """The likeliest tokens of all models, the likeliest first; a column for each model."""
    largest: dict[str, float] = {}  # token → its largest probability in any model
    for answer in answers:
        for token, probability in answer.top_k:
            largest[token] = max(largest.get(token, 0.0), probability)
    tokens = sorted(largest, key=lambda token: -largest[token])
    columns = [Column[str]("next", lambda token: escape_whitespace(token)[:MAX_TOKEN])]
    for answer in answers:
        columns.append(Column(answer.title, _probability(answer, answers[0])))
    return tokens, columns


def _probability(answer: Answer, first: Answer) -> Callable[[str], Content]:
    """`50.0 +25.0 ████`: percent, and the difference to the first model in percentage points."""

    def cell(token: str) -> Content:
        probability, before = answer.probabilities.get(token), first.probabilities.get(token)
        if probability is None:
            return Content.styled("unknown", MUTED)
        difference = ("", "") if answer is first else _difference(probability, before)
        drawn = f" {bar(probability, BAR)}", MUTED
        return Content.assemble(f"{100 * probability:5.1f}", difference, drawn)

    return cell


def _difference(probability: float, before: float | None) -> tuple[str, str]:
    """The sign is there because colour must not be the only cue."""
    points = round(100 * (probability - (before or 0.0)), 1)
    if not points:
        return "     =", MUTED
    return f"{points:>+6.1f}".replace("-", "−"), "$success" if points > 0 else "$error"
