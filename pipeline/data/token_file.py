"""The tokens of the data files, in one memory-mapped file; the index takes 20 bytes of memory per example."""

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pipeline.data.examples import Example
from pipeline.data.masking import Encoded
from pipeline.errors import UserError

FILE = "tokens.bin"
STORED = np.dtype("<i4")

Tokens: TypeAlias = NDArray[np.int32]


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


class Corpus:
    """Encoded examples in their original order. An id that is not trained on is stored as ~id, which is negative."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._starts = array("q", [0])  # offsets in tokens, with the end of the last
        self._lines, self._cuts = array("q"), array("i")
        self._files: list[str] = []  # _files[i] begins with example number _first[i]
        self._first: list[int] = []
        self._labels = self._truncated = self._unlabelled = 0
        self._tokens: Tokens = np.empty(0, STORED)

    @classmethod
    def build(cls, examples: Iterable[Example], encode: Callable[[Example], Encoded], folder: Path) -> "Corpus":
        """Encode each example once, into a file in `folder`. Passes on what `encode` raises."""
        corpus = cls(folder / FILE)
        with corpus._path.open("wb") as file:
            for example in examples:
                encoded = encode(example)
                if corpus._add_to_index(example, encoded):
                    stored = [id_ if on else ~id_ for id_, on in zip(encoded.ids, encoded.trained, strict=True)]
                    file.write(np.array(stored, STORED).tobytes())
        if len(corpus):
            corpus._tokens = np.memmap(corpus._path, STORED, "r")
        return corpus

    def _add_to_index(self, example: Example, encoded: Encoded) -> bool:
        """Count an example; False if it has no label, and is left out."""
        self._truncated += bool(encoded.cut)
        if not encoded.labels:
            self._unlabelled += 1
            return False
        if not self._files or self._files[-1] != example.file:
            self._files.append(example.file)
            self._first.append(len(self))
        self._labels += encoded.labels
        self._lines.append(example.line)
        self._cuts.append(encoded.cut)
        self._starts.append(self._starts[-1] + len(encoded.ids))
        return True

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Encoded:
        """The example as `encode` returned it. Raises IndexError."""
        ids, trained = self.arrays(index)
        return Encoded(tuple(ids.tolist()), tuple(trained.tolist()), self._cuts[index])

    def __iter__(self) -> Iterator[Encoded]:
        return (self[index] for index in range(len(self)))

    def arrays(self, index: int) -> tuple[Tokens, NDArray[np.bool_]]:
        """Ids (T,) and which of them are trained on (T,)."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        stored = np.asarray(self._tokens[self._starts[index] : self._starts[index + 1]])
        trained = stored >= 0
        return np.where(trained, stored, ~stored), trained

    @property
    def example_lengths(self) -> NDArray[np.int64]:
        """Number of tokens of each example (N,)."""
        starts: NDArray[np.int64] = np.array(self._starts, np.int64)
        return starts[1:] - starts[:-1]

    def location(self, index: int) -> str:
        """Source of an example, as `file:line`."""
        return f"{self._files[bisect_right(self._first, index) - 1]}:{self._lines[index]}"

    @property
    def statistics(self) -> Statistics:
        lengths = np.sort(self.example_lengths) if len(self) else np.zeros(1, np.int64)
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
            f"{name}: nothing to train on: {counts.truncated} of {counts.unlabelled} examples were cut before their "
            "first label. Raise max_length, or shorten the prompts."
        )
    raise UserError(f"{name}: nothing to train on: every example is shorter than two tokens. Write longer ones.")
