"""An example to train on, as it was read from a data file, and the training windows cut from its
tokens.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NotRequired, TypedDict

IGNORED = -100  # cross-entropy's ignore_index
FIRST_WITHOUT_SPACES = "\u2e80"  # from here on are scripts that put no spaces between words
Role = Literal["system", "developer", "user", "assistant", "tool"]


class Message(TypedDict):
    """One turn of a conversation, as a chat template gets it. `content` is None only beside tool
    calls.
    """

    role: Role
    content: str | None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[Mapping[str, Any]]]
    tool_call_id: NotRequired[str]
    name: NotRequired[str]


@dataclass(frozen=True)
class Example:
    """One row of a data file, with its file and its line or row number.

    A plain text has only `text`. With a prompt, `text` is prompt + completion; if both are equal,
    the completion is still to be generated. A conversation's `text` is the contents of its
    messages, one per line.

    `untrained`: the assistant's turns that carry no label, by index. `tools`: the schemas of the
    functions that the assistant may call. `begin`: the index of the message that the completion
    begins with, where the row says so. `rejected`: the worse answer of a preference pair, after the
    same prompt. `desirable`: whether the answer is a good one, where the row says so. `templated`:
    a prompt and its answer as texts, which are turns of a conversation for a model with a chat
    template (`masking.as_turns`).
    """

    text: str
    file: str
    line: int
    prompt: str | None = None
    messages: tuple[Message, ...] = ()
    untrained: frozenset[int] = frozenset()
    tools: tuple[Mapping[str, Any], ...] = ()
    begin: int = 0
    rejected: str | tuple[Message, ...] | None = None
    desirable: bool | None = None
    templated: bool = False

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
    """A run of consecutive tokens, beginning at position `start`, and the token that follows
    each.
    """

    start: int
    ids: tuple[int, ...]
    labels: tuple[int, ...]


def joins_words(before: str, after: str) -> bool:
    """Whether the last word of a text and the first of the next would be read as one."""
    letters = (before[-1:], after[:1])
    return all(letter.isalnum() and letter < FIRST_WITHOUT_SPACES for letter in letters)


def content_digest(example: Example) -> bytes:
    """Equal for examples of the same content, wherever they stand."""
    # Not by file and line either: the same text is then never trained on in one file and evaluated
    # in another.
    parts = [
        example.text,
        example.prompt,
        list(example.messages),
        *([example.tools] if example.tools else []),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).digest()


def in_evaluation(example: Example, share: float) -> bool:
    """Whether an example is held out, decided by a hash of its content.

    So adding lines moves no example between the splits, and duplicates land in the same one.
    """
    return share > 0 and is_held_out(content_digest(example), share)


def is_held_out(digest: bytes, share: float) -> bool:
    """`in_evaluation`, by the `content_digest`."""
    return int.from_bytes(digest[:8]) < share * 2**64


def windows(ids: tuple[int, ...], size: int) -> Iterator[Window]:
    """Every run of `size` tokens that has a next token for each (the document's §9.2, sequence
    length).

    A shorter sequence gives one shorter window; a sequence of one token gives none.
    """
    last = max(0, len(ids) - 1 - size)
    for start in range(last + 1):
        stop = min(start + size, len(ids) - 1)
        if stop > start:
            yield Window(start, ids[start:stop], ids[start + 1 : stop + 1])
