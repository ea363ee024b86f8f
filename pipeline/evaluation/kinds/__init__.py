"""The kinds of tasks: each file here is one with its `KIND`. Its name is the file's."""

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.data.examples import Message
from pipeline.data.formats import Record, read_list, read_string
from pipeline.extensions import Registry

Scores = Mapping[str, float]  # "score", from 0 to 1, and what else the kind measures


class TaskExample(NamedTuple):
    """`prompt`: a text to complete, or a conversation to answer. `row`: the example as its file has
    it.
    """

    prompt: str | tuple[Message, ...]
    row: Record
    location: str  # for error messages


Score = Callable[[Any, TaskExample], Scores]


class TaskOptions(NamedTuple):
    """What a task says beside its examples. `files`: the paths of evaluate.tasks → as they are
    written there.

    The files that a task names are relative to `folder`, its own file's.
    """

    values: Mapping[str, Any]
    location: str  # for error messages
    folder: Path
    files: Mapping[Path, str]


class Kind(NamedTuple):
    """What an example is asked, and how the answer is scored.

    `check(row, location)`: raises UserError for an example that cannot be scored.
    `scorer(options)`: the function that scores an answer to an example. `options`: keys of a task
    that only this kind reads → their types. `choices(row)`: the texts whose log-likelihoods (None:
    it has an unknown word) are the answer; without it, the answer is a generated text.
    """

    about: str
    check: Callable[[Record, str], object]
    scorer: Callable[[TaskOptions], Score]
    options: Mapping[str, Any] = {}
    choices: Callable[[Record], Sequence[str]] | None = None


def plain(text: str, ignore_case: bool = False) -> str:
    """The text for comparison: composed characters (NFC), one space for white space, none around
    it.
    """
    text = " ".join(unicodedata.normalize("NFC", text).split())
    return text.casefold() if ignore_case else text


def expected(row: Record, location: str) -> list[str]:
    """The answers that count as right: `answer`, a text or a list of texts. Raises UserError."""
    if not isinstance(row.get("answer"), list):
        return [read_string(row, "answer", location)]
    texts = read_list(row, "answer", location, "texts")
    return [read_string({"answer": text}, "answer", location) for text in texts]


KINDS = Registry[Kind]("evaluation")
