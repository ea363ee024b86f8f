"""Training sequences: tokens in one memory-mapped file, as whole examples or cut into windows."""

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol, Self

import numpy as np
import numpy.typing as npt

from pipeline.data.examples import IGNORED, Example, Window, cut_windows
from pipeline.data.masking import Encoded
from pipeline.errors import UserError

FILE = "tokens.bin"
STORED = np.dtype("<i4")

# Runs of examples or sequences, and how often each of their members is seen per epoch.
Parts = tuple[tuple[range, float], ...]


class Dataset(Protocol):
    """Training sequences by index, created on access, with the source of each."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int) -> Window: ...
    def tokens(self, number: int) -> int:
        """Length of a sequence, without creating it."""

    def location(self, number: int) -> str:
        """Source of a sequence, such as data/mine.jsonl:7."""

    @property
    def parts(self) -> Parts:
        """The weight of each run of sequences."""


@dataclass(frozen=True)
class Statistics:
    """Counts of a corpus; lengths in tokens."""

    examples: int
    tokens: int
    labels: int  # tokens that are trained on
    truncated: int  # examples that were cut, whether kept or left out
    unlabelled: int  # examples left out because they have no label
    shortest: int
    median: int
    longest: int

    @property
    def share(self) -> float:
        """Labels per token."""
        return self.labels / max(1, self.tokens)


class Corpus(Sequence[Window]):
    """A data set of whole examples, encoded into a file, in their order.

    Data may be larger than memory: in memory is an index of 17 bytes per example. An id that is not
    trained on is stored as ~id, which is negative, so that the mask needs no file of its own. A
    corpus is written inside `with`, and read after it.
    """

    def __init__(self, folder: Path, weights: Mapping[str, float] | None = None) -> None:
        """`weights`: file → how often each of its examples is seen per epoch."""
        self._path = folder / FILE
        self._weights = weights or {}
        self._starts = array("q", [0])  # offsets in tokens, with the end of the last
        self._lines = array("q")
        self._files: list[str] = []  # _files[i] begins with example number _first[i]
        self._first: list[int] = []
        self._labels = self._truncated = self._unlabelled = 0
        self.desirable = array("b")  # for KTO: whether each example's answer is a good one

    @classmethod
    def of(
        cls,
        encoded: Iterable[tuple[Example, Encoded]],
        folder: Path,
        weights: Mapping[str, float] | None = None,
    ) -> Self:
        """Write all of the encoded examples into a file in `folder`."""
        with cls(folder, weights) as corpus:
            for example, tokens in encoded:
                corpus.add(example, tokens)
        return corpus

    def __enter__(self) -> Self:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file: BinaryIO = self._path.open("wb")
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        # an empty file cannot be mapped
        self._tokens = np.memmap(self._path, STORED, "r") if len(self) else np.empty(0, STORED)

    def add(self, example: Example, encoded: Encoded) -> None:
        """Append an example, unless it has no label to train on."""
        self._truncated += bool(encoded.cut)
        if not encoded.labels:
            self._unlabelled += 1
            return
        if not self._files or self._files[-1] != example.file:
            self._files.append(example.file)
            self._first.append(len(self))
        self._labels += encoded.labels
        self._lines.append(example.line)
        self._starts.append(self._starts[-1] + len(encoded.ids))
        self.desirable.append(bool(example.desirable))
        ids = np.fromiter(encoded.ids, STORED, len(encoded.ids))
        # a fifth of np.array's time
        trained = np.fromiter(encoded.trained, np.bool_, len(encoded.ids))
        self._file.write(np.where(trained, ids, ~ids).tobytes())

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, number: int) -> Window:  # type: ignore[override]
        """Raises IndexError."""
        return window_of(self.stored(number))

    def stored(self, number: int) -> npt.NDArray[np.int32]:
        """The ids of an example (T,), as ~id where they are not trained on. Raises IndexError."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        return np.asarray(self._tokens[self._starts[number] : self._starts[number + 1]])

    def tokens(self, number: int) -> int:
        length = self._starts[number + 1] - self._starts[number]
        return length - 1  # the last token is a label alone

    def location(self, number: int) -> str:
        return f"{self._files[bisect_right(self._first, number) - 1]}:{self._lines[number]}"

    @property
    def parts(self) -> Parts:
        stops = [*self._first[1:], len(self)]
        runs = zip(self._first, stops, self._files, strict=False)
        return tuple(
            (range(first, stop), self._weights.get(file, 1.0)) for first, stop, file in runs
        )

    @property
    def statistics(self) -> Statistics:
        lengths = np.sort(np.diff(self._starts)) if len(self) else np.zeros(1, np.int64)
        return Statistics(
            examples=len(self),
            tokens=self._starts[-1],
            labels=self._labels,
            truncated=self._truncated,
            unlabelled=self._unlabelled,
            shortest=int(lengths[0]),
            median=int(lengths[len(lengths) // 2]),
            longest=int(lengths[-1]),
        )


def refuse_empty(corpus: Corpus, name: str) -> None:
    """Raises UserError if no example has a label. `name` is what the user calls the data."""
    counts = corpus.statistics
    if counts.examples:
        return
    if counts.truncated:
        raise UserError(
            f"{name}: nothing to train on: {counts.truncated} of {counts.unlabelled} examples "
            "were cut before their first label. Raise max_length, or shorten the prompts."
        )
    raise UserError(
        f"{name}: nothing to train on: every example is shorter than two tokens, labelled false, "
        "or marked with train: false. Add others."
    )


@dataclass(frozen=True)
class InMemoryDataset:
    """Sequences in memory, with the source of each."""

    windows: list[Window]
    locations: list[str]
    weighted: Parts = ()

    @property
    def parts(self) -> Parts:
        return self.weighted or ((range(len(self)), 1.0),)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, number: int) -> Window:
        return self.windows[number]

    def tokens(self, number: int) -> int:
        return len(self.windows[number].ids)

    def location(self, number: int) -> str:
        return self.locations[number]


def window_of(stored: npt.NDArray[np.int32]) -> Window:
    """Stored tokens as inputs ids[:-1] and labels ids[1:], IGNORED where not trained on."""
    ids = np.maximum(stored, ~stored)  # one of the two is negative
    labels = np.where(stored >= 0, stored, IGNORED)
    return Window(0, tuple(ids[:-1].tolist()), tuple(labels[1:].tolist()))


def as_window(encoded: Encoded) -> Window:
    """An example as one sequence, without a file."""
    ids = np.array(encoded.ids, STORED)
    return window_of(np.where(encoded.trained, ids, ~ids))


def dataset_from(corpus: Corpus, size: int) -> Dataset:
    """The examples, or, with `size` above 0, every run of `size` tokens that has a label."""
    if not size:
        return corpus
    windows: list[Window] = []
    locations: list[str] = []
    begins = [0]  # first window of each example, and the end
    for number, example in enumerate(corpus):
        for window in cut_windows(example, size):
            if any(label != IGNORED for label in window.labels):
                windows.append(window)
                locations.append(corpus.location(number))
        begins.append(len(windows))
    parts = tuple(
        (range(begins[run.start], begins[run.stop]), weight) for run, weight in corpus.parts
    )
    return InMemoryDataset(windows, locations, parts)
