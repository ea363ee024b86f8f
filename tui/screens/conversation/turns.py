"""The turns of a conversation: a message, a table of likely next tokens, the answers side by side."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from textual.binding import Binding, BindingType
from textual.containers import ItemGrid, Vertical, VerticalScroll
from textual.content import Content
from textual.events import Click
from textual.message import Message
from textual.widget import Widget
from textual.widgets import Static

from pipeline.files.text import escape_whitespace, printable
from pipeline.inference.talk import (
    END,
    FAILED,
    INTERRUPTED,
    LENGTH,
    LOADING,
    READING,
    STARTING,
    WAITING,
    WRITING,
    Answer,
    Turn,
    split_thoughts,
)
from tui.panes.table import Column, Table
from tui.widgets.cells import bar

MIN_COLUMN = 45  # cells of an answer: fewer are hard to read
MAX_TOKEN, BAR = 24, 8  # cells
TAB = "    "
STATES = {
    STARTING: "◌ starting the engine (importing libraries)",
    LOADING: "◌ loading",
    WAITING: "◌ waiting",
    READING: "◌ reading",
    WRITING: "◐ writing",
    INTERRUPTED: "▪ interrupted",
    LENGTH: "… limit reached",
    END: "",
    FAILED: "",
}


@dataclass(frozen=True)
class Showing:
    """What is shown besides the texts."""

    styles: Mapping[str, str]  # model → style of its name
    thoughts: bool = False
    strength: float = 1.0  # that is set now
    again: str = "Ctrl+R"  # the key that asks again


class Stop(Widget, can_focus=True):
    """What the cursor can be on: a message, or the reply to it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "open", "Edit, correct", id="chat.edit"),
        Binding("left", "branch(-1)", "Branches", id="chat.branch_before", key_display="← →"),
        Binding("right", "branch(1)", "Next branch", id="chat.branch_next", show=False),
        Binding("up,k", "move(-1)", "Message above", show=False),
        Binding("down,j", "move(1)", "Message below", show=False),
        Binding("home,g", "end(0)", "First message", show=False),
        Binding("end,G", "end(-1)", "Last message", show=False),
        Binding("y", "copy", "Copy", id="chat.copy"),
        Binding("tab", "leave", "Message", id="chat.message"),
    ]

    @dataclass
    class Opened(Message):
        """Enter was pressed on it."""

        turn: Turn
        is_reply: bool

    class Switched(Message):
        """Another branch is to be shown."""

    class Left(Message):
        """The cursor left the last one downwards."""

    @dataclass
    class Copied(Message):
        """A text is to be copied."""

        text: str

    turn: Turn
    is_reply = False

    def action_open(self) -> None:
        self.post_message(self.Opened(self.turn, self.is_reply))

    def action_branch(self, by: int) -> None:
        branches: Any = self.turn.replies if self.is_reply else self.turn.siblings
        if branches.step(by):
            self.post_message(self.Switched())

    def _stops(self) -> list["Stop"]:
        return list(self.screen.query(Stop))

    def action_move(self, by: int) -> None:
        stops = self._stops()
        at = stops.index(self) + by
        if at >= len(stops):
            self.post_message(self.Left())
        elif at >= 0:
            stops[at].focus()

    def action_end(self, index: int) -> None:
        self._stops()[index].focus()

    def action_leave(self) -> None:
        self.post_message(self.Left())

    def action_copy(self) -> None:
        texts = [self.turn.text]
        if self.is_reply:
            texts = [answer.content.strip() for answer in self.turn.reply.answers]
        self.post_message(self.Copied("\n\n".join(texts)))

    def on_click(self, _: Click) -> None:
        self.focus()


class Said(Stop, Static):
    """A message of the user."""

    def __init__(self, turn: Turn) -> None:
        head = Content.assemble(
            ("you  ", "$foreground-muted"), (str(turn.siblings), "$text-accent")
        )
        super().__init__(Content("\n").join([head, Content.styled(shown(turn.text), "bold")]))
        self.turn = turn


class Replied(Stop, ItemGrid):
    """The answers to a message: side by side where there is room."""

    is_reply = True

    def __init__(self, turn: Turn) -> None:
        super().__init__(min_column_width=MIN_COLUMN)
        self.turn = turn
        self.texts = [Static() for _ in turn.reply.answers]

    def compose(self) -> Iterable[Widget]:
        yield from self.texts

    def show(self, showing: Showing, is_last: bool) -> None:
        """Show what arrived. What is wrong with several models is said once, under the first."""
        answers, said = self.turn.reply.answers, dict[str, list[Answer]]()
        for answer in answers:
            if answer.error and not answer.text:
                said.setdefault(answer.error, []).append(answer)
        for number, (text, answer) in enumerate(zip(self.texts, answers, strict=True)):
            alike = said.get(answer.error, []) if not answer.text else []
            text.display = not alike or alike[0] is answer
            branches = str(self.turn.replies) if number == 0 else ""
            text.update(answer_content(alike or [answer], branches, showing, is_last))


class TurnView(Vertical):
    """A turn of the branch that is shown."""

    def __init__(self, turn: Turn) -> None:
        super().__init__()
        self.turn, self.reply = turn, turn.reply
        self.said, self.replied = Said(turn), Replied(turn)
        self.table = Table[str](key=lambda token: token)
        self.table.can_focus, self.table.display = False, False

    def compose(self) -> Iterable[Widget]:
        yield self.said
        yield self.table
        yield self.replied

    def show(self, showing: Showing, is_last: bool) -> None:
        self.replied.show(showing, is_last)
        self.show_table(self.reply.answers)

    def show_table(self, answers: Sequence[Answer]) -> None:
        known = [answer for answer in answers if answer.top_k]
        self.table.display = bool(known)
        if known:
            self.table.show(*next_tokens(known))


class History(VerticalScroll, can_focus=False):
    """The turns of the branch that is shown, the newest last; a sentence while there is none."""

    def __init__(self) -> None:
        super().__init__()
        self.nothing = Static(id="nothing", markup=False)
        self.views: list[TurnView] = []
        self._marks: list[object] = []  # what the views show

    def compose(self) -> Iterable[Widget]:
        yield self.nothing

    async def show(self, turns: Sequence[Turn], showing: Showing, empty: str) -> None:
        """Show the turns; the views of those that are shown already stay."""
        self.nothing.update(empty)
        self.nothing.display = not turns
        marks = [(turn, turn.reply, str(turn.siblings), str(turn.replies)) for turn in turns]
        pairs = enumerate(zip(marks, self._marks, strict=False))
        same = next((n for n, (new, old) in pairs if new != old), min(len(marks), len(self.views)))
        gone, self.views = self.views[same:], self.views[:same]
        self._marks = list(marks)
        fresh = [TurnView(turn) for turn in turns[same:]]
        self.views += fresh
        with self.app.batch_update():
            for view in gone:
                await view.remove()
            await self.mount_all(fresh)
            for view in self.views:
                view.show(showing, view is self.views[-1])
        if fresh:
            self.scroll_end(animate=False)

    def grew(self, showing: Showing) -> None:
        """The last turn has new text. At the end, stay at the end."""
        if self.views:
            at_end = self.is_vertical_scroll_end
            self.views[-1].show(showing, is_last=True)
            if at_end:
                self.scroll_end(animate=False, immediate=False)

    def stop_of(self, turn: Turn, is_reply: bool) -> Stop | None:
        """Where the cursor is on a message, or the reply to it."""
        view = next((view for view in self.views if view.turn is turn), None)
        if view is None:
            return None
        return view.replied if is_reply else view.said

    @property
    def last(self) -> Stop | None:
        return self.views[-1].said if self.views else None


def shown(text: str) -> str:
    """Control characters become visible signs, tabs four spaces."""
    return printable(text.replace("\t", TAB))


def answer_content(
    alike: Sequence[Answer], branches: str, showing: Showing, is_last: bool
) -> Content:
    """An answer: whose, how far, what was cut, its thoughts, its text, what is wrong."""
    answer = alike[0]
    thoughts, text, thinking = split_thoughts(answer.text, answer.unfinished)
    if not answer.chat:
        thoughts, text = "", answer.text
    parts = [_title(alike, branches, showing)]
    if answer.cut_tokens:
        parts.append(Content.styled(_cut(answer), "$text-warning"))
    if thoughts or thinking:
        sign, more = "▾" if showing.thoughts else "▸", "…" * (thinking and answer.unfinished)
        count = len(thoughts.split())
        parts.append(Content.styled(f"{sign} thoughts{more}  {count} words", "$foreground-muted"))
    if thoughts and showing.thoughts:
        lines = shown(thoughts.strip()).split("\n")
        parts += [Content.styled(f"│ {line}", "$foreground-muted") for line in lines]
    if text.strip():
        parts.append(Content(shown(text.strip())))
    if answer.error:
        parts.append(Content.styled(f"✗ {shown(answer.error)}", "$text-error"))
    if is_last and answer.content and answer.strength not in (None, showing.strength):
        now = f"{showing.again} asks again at ×{showing.strength:.2f}"
        parts.append(Content.styled(f"at ×{answer.strength:.2f}; {now}", "$text-warning"))
    return Content("\n").join(parts)


def _title(alike: Sequence[Answer], branches: str, showing: Showing) -> Content:
    answer, names = alike[0], []
    for each in alike:
        names.append(Content.styled(each.title, f"bold {showing.styles.get(each.model, '')}"))
    state = STATES[answer.state]
    if answer.state == END and not answer.tokens:
        state = "ended at once"
    facts = [f"{answer.tokens:,} token{'s' * (answer.tokens != 1)}"] * bool(answer.tokens)
    if answer.tokens_per_second:
        facts.append(f"{answer.tokens_per_second:,.0f} tokens/s")
    facts += [state] * bool(state)
    line = [Content(", ").join(names), Content.styled(" · ".join(facts), "$foreground-muted")]
    line.append(Content.styled(branches, "$text-accent"))
    return Content("  ").join(part for part in line if part)


def _cut(answer: Answer) -> str:
    earlier = "its beginning was"
    if answer.cut_messages:
        earlier = f"the first {answer.cut_messages} messages were"
    tokens = f"{answer.cut_tokens:,} tokens"
    return f"{earlier} left out ({tokens}): the window has {answer.window:,} tokens"


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
            return Content.styled("unknown", "$foreground-muted")
        percent = f"{100 * probability:5.1f}" if probability < 0.9995 else "  100"
        difference = ("", "") if answer is first else _difference(probability, before)
        visible = probability if probability >= 0.0005 else 0.0  # no bar if it rounds to 0.0
        return Content.assemble(percent, difference, (f" {bar(visible, BAR)}", "$foreground-muted"))

    return cell


def _difference(probability: float, before: float | None) -> tuple[str, str]:
    """The sign is there because colour must not be the only cue."""
    if before is None:
        return "   new", "$success"
    points = 100 * (probability - before)
    text = (f"{points:+.1f}" if abs(points) < 99.95 else f"{points:+.0f}").replace("-", "−")
    if text in ("+0.0", "−0.0"):
        return "     =", "$foreground-muted"
    return f"{text:>6}", "$success" if points > 0 else "$error"
