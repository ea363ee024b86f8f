"""Training sequences: a corpus's examples, whole or cut into windows."""

from dataclasses import dataclass
from typing import Protocol

from pipeline.data.examples import IGNORED, Window, windows
from pipeline.data.masking import Encoded
from pipeline.data.token_file import Corpus


class Dataset(Protocol):
    """Training sequences by index, created on access, with the source of each."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int) -> Window: ...
    def tokens(self, number: int) -> int:
        """Length of a sequence, without creating it."""

    def location(self, number: int) -> str:
        """Source of a sequence, such as data/mine.jsonl:7."""


@dataclass(frozen=True)
class ExampleDataset:
    """Every example as one sequence, read from disk on access."""

    corpus: Corpus

    def __len__(self) -> int:
        return len(self.corpus)

    def __getitem__(self, number: int) -> Window:
        return as_window(self.corpus[number])

    def tokens(self, number: int) -> int:
        return int(self.corpus.example_lengths[number]) - 1

    def location(self, number: int) -> str:
        return self.corpus.location(number)


@dataclass(frozen=True)
class InMemoryDataset:
    """Sequences in memory, with the source of each."""

    windows: list[Window]
    locations: list[str]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, number: int) -> Window:
        return self.windows[number]

    def tokens(self, number: int) -> int:
        return len(self.windows[number].ids)

    def location(self, number: int) -> str:
        return self.locations[number]


def as_window(encoded: Encoded) -> Window:
    """An example as one sequence: inputs ids[:-1], labels ids[1:], IGNORED where the label is not trained on."""
    labels = (id_ if on else IGNORED for id_, on in zip(encoded.ids[1:], encoded.trained[1:], strict=True))
    return Window(0, encoded.ids[:-1], tuple(labels))


def dataset_from(corpus: Corpus, window: int) -> Dataset:
    """The corpus's examples, or, with `window` above 0, every run of `window` tokens that has a label."""
    if not window:
        return ExampleDataset(corpus)
    kept: list[Window] = []
    locations: list[str] = []
    for number in range(len(corpus)):
        encoded = corpus[number]
        labels = as_window(encoded).labels
        for cut in windows(encoded.ids, window):
            window_labels = labels[cut.start : cut.start + len(cut.ids)]
            if any(label != IGNORED for label in window_labels):
                kept.append(Window(cut.start, cut.ids, window_labels))
                locations.append(corpus.location(number))
    return InMemoryDataset(kept, locations)
