"""An example to train on, as it was read from a data file, and the training windows cut from its tokens."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypedDict

IGNORED = -100  # cross-entropy's ignore_index
Role = Literal["system", "developer", "user", "assistant", "tool"]


class Message(TypedDict):
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True)
class Example:
    """One line of a data file, with its file and line number.

    A plain text has only `text`. With a prompt, `text` is prompt + completion; if both are equal, the completion is
    still to be generated. A conversation's `text` is the contents of its messages, one per line.
    """

    text: str
    file: str
    line: int
    prompt: str | None = None
    messages: tuple[Message, ...] = ()

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
    """A run of consecutive tokens, beginning at position `start`, and the token that follows each."""

    start: int
    ids: tuple[int, ...]
    labels: tuple[int, ...]


def in_evaluation(example: Example, share: float) -> bool:
    """Whether an example is held out, decided by a hash of its content.

    So adding lines moves no example between the splits, and duplicates land in the same one.
    """
    # Not by file and line either: the same text is then never trained on in one file and evaluated in another.
    content = json.dumps([example.text, example.prompt, list(example.messages)], sort_keys=True)
    return int.from_bytes(hashlib.sha256(content.encode()).digest()[:8]) < share * 2**64


def windows(ids: tuple[int, ...], size: int) -> Iterator[Window]:
    """Every run of `size` tokens that has a next token for each (the document's §9.2, sequence length).

    A shorter sequence gives one shorter window; a sequence of one token gives none.
    """
    last = max(0, len(ids) - 1 - size)
    for start in range(last + 1):
        stop = min(start + size, len(ids) - 1)
        if stop > start:
            yield Window(start, ids[start:stop], ids[start + 1 : stop + 1])
