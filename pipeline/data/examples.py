"""An example of a data file, and the windows to train on that are cut from its tokens."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict

IGNORED = -100  # cross-entropy's ignore_index
FIRST_WITHOUT_SPACES = "\u2e80"  # from here on are scripts that put no spaces between words
Role = Literal["system", "developer", "user", "assistant", "tool"]


class Message(TypedDict):
    """One turn of a conversation, as a chat template gets it."""

    role: Role
    content: str | None  # None only beside tool calls
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[Mapping[str, Any]]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


@dataclass(frozen=True)
class Example:
    """One row of a data file, with its file and its line or row number."""

    # of a prompt: prompt + completion, or the prompt alone, which the model is to complete;
    # of a conversation: the contents of its messages, one per line
    text: str
    file: str
    line: int
    prompt: str | None = None
    messages: tuple[Message, ...] = ()
    untrained: frozenset[int] = frozenset()  # indices of assistant turns that carry no label
    tools: tuple[Mapping[str, Any], ...] = ()  # the schemas of functions that may be called
    begin: int = 0  # index of the message that the completion begins with, where the row says so
    rejected: str | tuple[Message, ...] | None = None  # a pair's worse answer to the same prompt
    desirable: bool | None = None  # whether the answer is a good one, where the row says so
    # a prompt and its answer as texts, which are turns for a model with a chat template
    templated: bool = False
    held_out: bool = False  # for the evaluation during training

    @property
    def location(self) -> str:
        """As `file:line`, for error messages."""
        return f"{self.file}:{self.line}"

    @property
    def completion(self) -> str:
        """The text after the prompt, including any leading white space."""
        return self.text[len(self.prompt or "") :]


@dataclass(frozen=True)
class Window:
    """Consecutive tokens from position `start` on, and for each the label, IGNORED without one."""

    start: int
    ids: tuple[int, ...]
    labels: tuple[int, ...]


def joins_words(before: str, after: str) -> bool:
    """Whether the last word of a text and the first of the next would be read as one."""
    letters = (before[-1:], after[:1])
    return all(letter.isalnum() and letter < FIRST_WITHOUT_SPACES for letter in letters)


def content_digest(example: Example) -> bytes:
    """32 bytes, equal for examples of the same content.

    File and line do not count: no text is trained on in one file and evaluated in another. A
    rejected answer and a label do not count either.
    """
    parts: list[Any] = [example.text, example.prompt, example.messages]
    if example.tools:
        parts.append(example.tools)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest()


def row_digest(example: Example) -> bytes:
    """32 bytes: as `content_digest`, but a rejected answer and a label count too."""
    digest = content_digest(example)
    if example.rejected is None and example.desirable is None:
        return digest
    more = json.dumps([example.rejected, example.desirable])
    return hashlib.sha256(digest + more.encode()).digest()


def in_evaluation(example: Example, share: float) -> bool:
    """Whether an example is held out, decided by a hash of its content.

    So adding lines moves no example between the splits, and duplicates land in the same one.
    """
    return share > 0 and is_held_out(content_digest(example), share)


def is_held_out(digest: bytes, share: float) -> bool:
    """`in_evaluation` of an example with this `content_digest`."""
    return int.from_bytes(digest[:8]) < share * 2**64


def cut_windows(sequence: Window, size: int) -> Iterator[Window]:
    """Every run of `size` tokens of a sequence; a shorter one gives one shorter window."""
    if not sequence.ids:
        return
    for start in range(max(1, len(sequence.ids) - size + 1)):
        stop = start + size
        yield Window(start, sequence.ids[start:stop], sequence.labels[start:stop])
