"""A conversation as a tree: an edited message or another answer begins a branch, and no message is
ever lost.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum, auto
from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")
Message = dict[str, str]  # role and content

OPEN, CLOSE = "<think>", "</think>"  # of the thoughts of a reasoning model


class State(StrEnum):
    """Of an answer."""

    LOADING = auto()
    WAITING = auto()
    READING = auto()
    WRITING = auto()
    END = auto()
    LENGTH = auto()
    INTERRUPTED = auto()
    FAILED = auto()


ENDED = (State.END, State.LENGTH, State.INTERRUPTED, State.FAILED)


class Thoughts(NamedTuple):
    """The thoughts at the beginning of a text, the answer after them, and whether they go on."""

    thoughts: str
    answer: str
    unfinished: bool = False


def split_thoughts(text: str, arrives: bool = False) -> Thoughts:
    """Of a text that still arrives, an incomplete tag at its end is neither thought nor answer."""
    start = text.lstrip()
    if not start.startswith(OPEN):
        is_tag = arrives and OPEN.startswith(start)
        return Thoughts("", "" if is_tag else text)
    thoughts, closed, answer = start.removeprefix(OPEN).partition(CLOSE)
    if closed:
        return Thoughts(thoughts, answer)
    ends = (n for n in range(len(CLOSE) - 1, 0, -1) if thoughts.endswith(CLOSE[:n]))
    held = next(ends, 0) if arrives else 0
    return Thoughts(thoughts[: len(thoughts) - held], "", unfinished=True)


@dataclass(eq=False)
class Branches(Generic[T]):
    """Alternatives, one of which is shown."""

    items: list[T] = field(default_factory=list)
    index: int = 0

    @property
    def shown(self) -> T:
        return self.items[self.index]

    def add(self, item: T) -> T:
        """Append an alternative and show it."""
        self.items.append(item)
        self.index = len(self.items) - 1
        return item

    def step(self, by: int) -> bool:
        """Show the next or previous alternative. False at the ends."""
        if not 0 <= self.index + by < len(self.items):
            return False
        self.index += by
        return True

    def __str__(self) -> str:
        return f"‹ {self.index + 1}/{len(self.items)} ›" if len(self.items) > 1 else ""


@dataclass(eq=False)
class Answer:
    """A model's answer as it arrives. `model` is its path; `strength` is None if it cannot be
    scaled.
    """

    model: str
    label: str
    strength: float | None = None
    chat: bool = False  # in a chat template; else the text goes on
    state: State = State.WAITING
    error: str = ""  # why it is missing or incomplete
    text: str = ""  # all that the model wrote
    tokens: int = 0
    tokens_per_second: float | None = None
    prompt_tokens: int = 0
    window: int = 0  # tokens that the model can read
    cut_messages: int = 0  # at the beginning, which no longer fitted
    cut_tokens: int = 0
    # the likeliest next tokens, and the probability of every token of the table: None is unknown
    top_k: list[tuple[str, float]] = field(default_factory=list)
    probabilities: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def content(self) -> str:
        """What the conversation goes on with: in a chat, the answer without thoughts."""
        return split_thoughts(self.text).answer.strip() if self.chat else self.text

    @property
    def title(self) -> str:
        return self.label if self.strength in (None, 1.0) else f"{self.label} ×{self.strength:.2f}"

    @property
    def unfinished(self) -> bool:
        return self.state not in ENDED


@dataclass(eq=False)
class Reply:
    """The answers of one or more models to the same question, and what was said after them."""

    answers: list[Answer]
    turns: "Branches[Turn]" = field(default_factory=Branches)

    def answer_of(self, model: str) -> Answer:
        """The model's own answer; of a model that was not asked then, the first with a text."""
        spoken = [answer for answer in self.answers if answer.content] or self.answers
        return next((answer for answer in spoken if answer.model == model), spoken[0])


@dataclass(eq=False)
class Turn:
    """A message of the user and the replies to it."""

    text: str
    siblings: "Branches[Turn]" = field(repr=False)  # with itself
    replies: Branches[Reply] = field(default_factory=Branches)

    @property
    def reply(self) -> Reply:
        return self.replies.shown


class Talk:
    """The tree. `turns` is the branch that is shown."""

    def __init__(self, system: str = "") -> None:
        self.system = system
        self.first: Branches[Turn] = Branches()

    @property
    def turns(self) -> list[Turn]:
        turns, branches = list[Turn](), self.first
        while branches.items:
            turns.append(branches.shown)
            branches = branches.shown.reply.turns
        return turns

    def every_turn(self) -> Iterator[Turn]:
        """The turns of all branches."""
        stack = [*reversed(self.first.items)]
        while stack:
            turn = stack.pop()
            yield turn
            for reply in reversed(turn.replies.items):
                stack.extend(reversed(reply.turns.items))

    @property
    def answer_count(self) -> int:
        """The answers of all branches."""
        replies = (reply for turn in self.every_turn() for reply in turn.replies.items)
        return sum(len(reply.answers) for reply in replies)

    def ask(self, text: str, answers: list[Answer]) -> Turn:
        """Add a message at the end of the shown branch; `answers` are still to be written."""
        turns = self.turns
        return self._add(turns[-1].reply.turns if turns else self.first, text, answers)

    def edit(self, turn: Turn, text: str, answers: list[Answer]) -> Turn:
        """Ask another message in place of `turn`. The former one stays as a branch, with all that
        followed.
        """
        return self._add(turn.siblings, text, answers)

    def ask_again(self, turn: Turn, answers: list[Answer]) -> None:
        """Ask the same message. The former reply stays as a branch, with all that followed."""
        turn.replies.add(Reply(answers))

    def _add(self, branches: Branches[Turn], text: str, answers: list[Answer]) -> Turn:
        turn = Turn(text, branches)
        turn.replies.add(Reply(answers))
        return branches.add(turn)

    def messages(self, turn: Turn, model: str) -> list[Message]:
        """What a model reads for its answer to `turn`: system prompt, earlier turns with its own
        answers, the message.

        Turns without an answer are left out, as templates reject two messages of the user in a row;
        but a text that a model without template had nothing to add to goes on.
        """
        messages = [{"role": "system", "content": self.system}] * bool(self.system)
        turns = self.turns
        for earlier in turns[: turns.index(turn)]:
            answer = earlier.reply.answer_of(model)
            if answer.content or (answer.state == State.END and not answer.chat):
                messages.append({"role": "user", "content": earlier.text})
            if answer.content:
                messages.append({"role": "assistant", "content": answer.content})
        return [*messages, {"role": "user", "content": turn.text}]
