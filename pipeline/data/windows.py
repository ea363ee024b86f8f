"""Training sequences: the tokens of the data files in one memory-mapped file, whole examples or cut
into windows.
"""

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from pipeline.data.examples import IGNORED, Example, Window, windows
from pipeline.data.masking import Encoded, Encoder
from pipeline.errors import UserError

FILE = "tokens.bin"
STORED = np.dtype("<i4")


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


# Runs of examples or sequences, and how often each of their members is seen per epoch.
Parts = tuple[tuple[range, float], ...]


class Corpus:
    """Encoded examples in their original order, on disk.

    Data may be larger than memory: in memory is an index of 20 bytes per example. An id that is not
    trained on is stored as ~id, which is negative, so that the mask needs no file of its own.
    """

    def __init__(
        self,
        examples: Iterable[Example],
        encode: Callable[[Example], Encoded] | Encoder,
        folder: Path,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        """Encode each example once, into a file in `folder`. Passes on what `encode` raises.

        `weights`: file → how often each of its examples is seen per epoch.
        """
        self._weights = weights or {}
        pairs = (
            encode.each(examples)
            if isinstance(encode, Encoder)
            else ((e, encode(e)) for e in examples)
        )
        self._starts = array("q", [0])  # offsets in tokens, with the end of the last
        self._lines, self._cuts = array("q"), array("i")
        self._files: list[str] = []  # _files[i] begins with example number _first[i]
        self._first: list[int] = []
        self._labels = self._truncated = self._unlabelled = 0
        with (folder / FILE).open("wb") as file:
            for example, encoded in pairs:
                self._truncated += bool(encoded.cut)
                if not encoded.labels:  # nothing to train on
                    self._unlabelled += 1
                    continue
                if not self._files or self._files[-1] != example.file:
                    self._files.append(example.file)
                    self._first.append(len(self))
                self._labels += encoded.labels
                self._lines.append(example.line)
                self._cuts.append(encoded.cut)
                self._starts.append(self._starts[-1] + len(encoded.ids))
                ids = np.fromiter(encoded.ids, STORED, len(encoded.ids))
                # a fifth of np.array's time
                trained = np.fromiter(encoded.trained, np.bool_, len(encoded.ids))
                file.write(np.where(trained, ids, ~ids).tobytes())
        # An empty file cannot be mapped.
        self._tokens = np.memmap(folder / FILE, STORED, "r") if len(self) else np.empty(0, STORED)

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Encoded:
        """The example as `encode` returned it. Raises IndexError."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        stored = np.asarray(self._tokens[self._starts[index] : self._starts[index + 1]])
        trained = stored >= 0
        ids = np.where(trained, stored, ~stored)
        return Encoded(tuple(ids.tolist()), tuple(trained.tolist()), self._cuts[index])

    def length(self, index: int) -> int:
        """Number of tokens of an example, without reading it."""
        return self._starts[index + 1] - self._starts[index]

    def location(self, index: int) -> str:
        """Source of an example, as `file:line`."""
        return f"{self._files[bisect_right(self._first, index) - 1]}:{self._lines[index]}"

    @property
    def parts(self) -> Parts:
        """The weight of each run of examples."""
        stops = [*self._first[1:], len(self)]
        runs = zip(self._first, stops, self._files, strict=True) if len(self) else ()
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
            "were cut before their "
            "first label. Raise max_length, or shorten the prompts."
        )
    raise UserError(
        f"{name}: nothing to train on: every example is shorter than two tokens. Write longer ones."
    )


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
class ExampleDataset:
    """Every example as one sequence, read from disk on access."""

    corpus: Corpus

    def __len__(self) -> int:
        return len(self.corpus)

    def __getitem__(self, number: int) -> Window:
        return as_window(self.corpus[number])

    def tokens(self, number: int) -> int:
        return self.corpus.length(number) - 1

    def location(self, number: int) -> str:
        return self.corpus.location(number)

    @property
    def parts(self) -> Parts:
        return self.corpus.parts


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


def as_window(encoded: Encoded) -> Window:
    """An example as one sequence: inputs ids[:-1], labels ids[1:], IGNORED where the label is not
    trained on.
    """
    labels = (
        id_ if on else IGNORED for id_, on in zip(encoded.ids[1:], encoded.trained[1:], strict=True)
    )
    return Window(0, encoded.ids[:-1], tuple(labels))


def dataset_from(corpus: Corpus, window: int) -> Dataset:
    """The corpus's examples, or, with `window` above 0, every run of `window` tokens that has a
    label.
    """
    if not window:
        return ExampleDataset(corpus)
    kept: list[Window] = []
    locations: list[str] = []
    begins = [0]  # first window of each example, and the end
    for number in range(len(corpus)):
        encoded = corpus[number]
        labels = as_window(encoded).labels
        for cut in windows(encoded.ids, window):
            window_labels = labels[cut.start : cut.start + len(cut.ids)]
            if any(label != IGNORED for label in window_labels):
                kept.append(Window(cut.start, cut.ids, window_labels))
                locations.append(corpus.location(number))
        begins.append(len(kept))
    parts = tuple(
        (range(begins[run.start], begins[run.stop]), weight) for run, weight in corpus.parts
    )
    return InMemoryDataset(kept, locations, parts)
