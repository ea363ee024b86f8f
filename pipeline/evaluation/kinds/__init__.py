"""The kinds of tasks. Each file here defines one as `KIND`; it has the file's name."""

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.data.examples import Message
from pipeline.data.formats import Record, read_list, read_string
from pipeline.extensions import Registry

Scores = Mapping[str, float]  # "score", from 0 to 1, and what else the kind measures


class TaskExample(NamedTuple):
    """An example of a task, and where its file has it."""

    prompt: str | tuple[Message, ...]  # a text to complete, or a conversation to answer
    row: Record  # as it is in the file
    location: str  # for error messages


Score = Callable[[Any, TaskExample], Scores]


class TaskOptions(NamedTuple):
    """A task's settings, without its examples."""

    values: Mapping[str, Any]
    location: str  # for error messages
    folder: Path  # of the task's file: the files that the task names are relative to it
    files: Mapping[Path, str]  # path of each file of evaluate.tasks → as it is written there


class Kind(NamedTuple):
    """How an example is asked, and how the answer is scored."""

    about: str
    # (row, location): raises UserError for an example that cannot be scored
    check: Callable[[Record, str], object]
    # a task's options → the function that scores an answer to an example
    scorer: Callable[[TaskOptions], Score]
    # keys of a task that only this kind reads → their types
    options: Mapping[str, Any] = {}
    # a row → the texts that the model chooses from; the answer is their log-likelihoods, None for
    # a text with an unknown word. Without it, the answer is a generated text.
    choices: Callable[[Record], Sequence[str]] | None = None


def plain(text: str, ignore_case: bool = False) -> str:
    """The text for comparison: in NFC, white space as one space, and none at the ends."""
    text = " ".join(unicodedata.normalize("NFC", text).split())
    return text.casefold() if ignore_case else text


def expected(row: Record, location: str) -> list[str]:
    """The answers that count as right: `answer`, a text or a list of texts. Raises UserError."""
    if not isinstance(row.get("answer"), list):
        return [read_string(row, "answer", location)]
    texts = read_list(row, "answer", location, "texts")
    return [read_string({"answer": text}, "answer", location) for text in texts]


def comparing(is_right: Callable[[str, Sequence[str]], bool]) -> Callable[[TaskOptions], Score]:
    """A scorer that gives 1 if `is_right(answer, expected)`, else 0.

    Both are made `plain` before, without case if the task sets `ignore_case`.
    """

    def scorer(options: TaskOptions) -> Score:
        ignore_case = options.values.get("ignore_case", False)

        def score(answer: str, example: TaskExample) -> Scores:
            texts = [plain(text, ignore_case) for text in expected(example.row, example.location)]
            return {"score": float(is_right(plain(answer, ignore_case), texts))}

        return score

    return scorer


KINDS = Registry[Kind]("evaluation")
