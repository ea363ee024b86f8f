"""The lines of a conversation: a turn is the message, then the answers, side by side or one below
the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rich.cells import cell_len

from tui.screens.chat.talk import (
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
)
from tui.screens.chat.thoughts import ThoughtSplitter, WrappedText
from tui.widgets.text import pad_or_truncate

GAP = 3  # cells between two columns, with a rule in the middle
MIN_COLUMN, MAX_COLUMN = 45, 120  # cells of an answer: fewer or more are hard to read
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
ROLE, NAME, MESSAGE, TEXT = "role", "name", "message", "text"
THOUGHT, WARNING, ERROR, BRANCH = "thought", "warning", "error", "branch"


class Part(NamedTuple):
    """A text and its kind, which decides its colour. A name has the colour of its model."""

    text: str
    kind: str
    model: str = ""


Line = Sequence[Part]


@dataclass(frozen=True)
class Showing:
    """What is shown besides the texts."""

    thoughts: bool = False
    strength: float = 1.0  # that is set now
    again: str = "Ctrl+R"  # the key that asks again


class AnswerView:
    """An answer wrapped to a width. `update` reads what arrived since, which costs the same however
    long it is.
    """

    def __init__(self, answer: Answer, width: int, branches: str, is_last: bool) -> None:
        self.answer, self.width, self.branches, self.is_last = answer, width, branches, is_last
        self._seen = 0  # pieces
        self._splitter = ThoughtSplitter()
        self._thoughts, self._text = WrappedText(width - 2), WrappedText(width)
        self._words = 0
        self._head: list[Line] = []
        self._tail: list[Line] = []
        self._thoughts_height = 0  # lines that are shown

    def update(self, showing: Showing) -> None:
        answer = self.answer
        for piece in answer.pieces[self._seen :]:
            self._append(*(self._splitter.feed(piece) if answer.chat else ("", piece)))
        self._seen = len(answer.pieces)
        if not answer.unfinished:
            self._append(*self._splitter.finish())
        self._head = [self._title(), *self._wrapped(self._cut(), WARNING)]
        if self._words or self._splitter.thinking:
            sign, more = (
                "▾" if showing.thoughts else "▸",
                "…" if self._splitter.thinking and answer.unfinished else "",
            )
            self._head.append([Part(f"{sign} thoughts{more}  {self._words} words", THOUGHT)])
        self._thoughts_height = self._thoughts.height if showing.thoughts else 0
        self._tail = self._wrapped(f"✗ {answer.error}" if answer.error else "", ERROR)
        if self.is_last and answer.strength not in (None, showing.strength) and answer.content:
            text = (
                f"at ×{answer.strength:.2f}; {showing.again} asks again at ×{showing.strength:.2f}"
            )
            self._tail += self._wrapped(text, WARNING)

    def _append(self, thought: str, text: str) -> None:
        self._thoughts.append(thought)
        self._words += len(thought.split())  # a word in two pieces counts twice: it tells the size
        self._text.append(text)

    def _title(self) -> Line:
        answer = self.answer
        speed = f"{answer.tokens_per_second:,.0f} tokens/s" if answer.tokens_per_second else ""
        count = f"{answer.tokens:,} token{'s' * (answer.tokens != 1)}" if answer.tokens else ""
        state = (
            "ended at once" if answer.state == END and not answer.tokens else STATES[answer.state]
        )
        facts = " · ".join(filter(None, (count, speed, state)))
        room = self.width - cell_len(self.branches) - 1
        name = pad_or_truncate(answer.title, min(cell_len(answer.title), max(room, 1)))
        facts = pad_or_truncate(f"  {facts}", max(room - cell_len(name), 0)) if facts else ""
        return spread(
            [Part(name, NAME, answer.model), Part(facts, ROLE)],
            Part(self.branches, BRANCH),
            self.width,
        )

    def _cut(self) -> str:
        answer = self.answer
        if not answer.cut_tokens:
            return ""
        earlier = (
            f"the first {answer.cut_messages} messages were"
            if answer.cut_messages
            else "its beginning was"
        )
        return (
            f"{earlier} left out ({answer.cut_tokens:,} tokens): the window has {answer.window:,} "
            "tokens"
        )

    def _wrapped(self, text: str, kind: str) -> list[Line]:
        return [[Part(line, kind)] for line in WrappedText(self.width, text).lines]

    @property
    def height(self) -> int:
        return len(self._head) + self._thoughts_height + self._text.height + len(self._tail)

    def line(self, index: int) -> Line:
        if index < len(self._head):
            return self._head[index]
        index -= len(self._head)
        if index < self._thoughts_height:
            return [Part(f"│ {self._thoughts.lines[index]}", THOUGHT)]
        index -= self._thoughts_height
        if index < self._text.height:
            return [Part(self._text.lines[index], TEXT)]
        index -= self._text.height
        return self._tail[index] if index < len(self._tail) else []


class TurnView:
    """A turn at a width. An empty line is below it."""

    def __init__(self, turn: Turn, width: int, is_last: bool) -> None:
        self.turn, self.reply, self.width, self.is_last = turn, turn.reply, width, is_last
        answers = turn.reply.answers
        self.side_by_side = len(answers) > 1 and width >= MIN_COLUMN * len(answers) + GAP
        column = (width - GAP * (len(answers) - 1)) // len(answers) if self.side_by_side else width
        self._column = min(column, MAX_COLUMN)
        role = spread([Part("you", ROLE)], Part(str(turn.siblings), BRANCH), self._column)
        lines = WrappedText(min(width, MAX_COLUMN), turn.text).lines
        self._message: list[Line] = [role, *([Part(line, MESSAGE)] for line in lines)]
        self._marks = str(turn.siblings), str(turn.replies)
        # the answer whose title shows the branches
        carrier = len(answers) - 1 if self.side_by_side else 0
        self.answers = [
            AnswerView(answer, self._column, str(turn.replies) if n == carrier else "", is_last)
            for n, answer in enumerate(answers)
        ]

    def shows(self, turn: Turn, width: int, is_last: bool) -> bool:
        """Whether it is the view of this reply at this width, with these branches."""
        marks = str(turn.siblings), str(turn.replies)
        mine = (self.turn, self.reply, self.width, self.is_last, self._marks)
        return mine == (turn, turn.reply, width, is_last, marks)

    def update(self, showing: Showing) -> None:
        for answer in self.answers:
            answer.update(showing)

    @property
    def message_height(self) -> int:
        return len(self._message)

    @property
    def height(self) -> int:
        heights = [answer.height for answer in self.answers]
        return len(self._message) + (max(heights) if self.side_by_side else sum(heights)) + 1

    def line(self, index: int) -> Line:
        if index < len(self._message):
            return self._message[index]
        index -= len(self._message)
        if not self.side_by_side:
            for answer in self.answers:
                if index < answer.height:
                    return answer.line(index)
                index -= answer.height
            return []
        if index >= max(answer.height for answer in self.answers):
            return []
        line: list[Part] = []
        for n, answer in enumerate(self.answers):
            line += [Part(" │ ", ROLE)] if n else []
            parts = answer.line(index)
            room = self._column - sum(cell_len(part.text) for part in parts)
            line += [*parts, Part(" " * room, TEXT)]
        return line


def spread(left: Line, right: Part, width: int) -> Line:
    """Parts at the left end of a line, and one at the right end."""
    if not right.text:
        return left
    room = width - sum(cell_len(part.text) for part in left) - cell_len(right.text)
    return [*left, Part(" " * max(room, 1), ROLE), right]
