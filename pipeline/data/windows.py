"""What training reads: a corpus's examples whole, or cut into windows."""

from dataclasses import dataclass
from typing import Protocol

from pipeline.data.examples import IGNORED, Window, windows
from pipeline.data.masking import Encoded
from pipeline.data.token_file import Corpus


class Dataset(Protocol):
    """What a stage trains on: sequences by number, made when they are asked for, and where each comes from."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int) -> Window: ...
    def tokens(self, number: int) -> int:
        """Length, known without making it."""

    def place(self, number: int) -> str:
        """Such as data/mine.jsonl:7."""


@dataclass(frozen=True)
class ExampleDataset:
    """Every example as one sequence, made from the disk when it is asked for."""

    corpus: Corpus

    def __len__(self) -> int:
        return len(self.corpus)

    def __getitem__(self, number: int) -> Window:
        return as_window(self.corpus[number])

    def tokens(self, number: int) -> int:
        return int(self.corpus.example_lengths[number]) - 1

    def place(self, number: int) -> str:
        return self.corpus.place(number)


@dataclass(frozen=True)
class InMemoryDataset:
    """Sequences in memory, and where each comes from."""

    windows: list[Window]
    places: list[str]

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, number: int) -> Window:
        return self.windows[number]

    def tokens(self, number: int) -> int:
        return len(self.windows[number].ids)

    def place(self, number: int) -> str:
        return self.places[number]


def as_window(encoded: Encoded) -> Window:
    """An example as one sequence: each token is to predict the next, where that is to be learned."""
    labels = (id_ if on else IGNORED for id_, on in zip(encoded.ids[1:], encoded.trained[1:], strict=True))
    return Window(0, encoded.ids[:-1], tuple(labels))


def dataset_from(corpus: Corpus, window: int) -> Dataset:
    """The corpus's examples, or, with `window` above 0, every run of so many tokens in which something is learned."""
    if not window:
        return ExampleDataset(corpus)
    found: list[Window] = []
    places: list[str] = []
    for number in range(len(corpus)):
        encoded = corpus[number]
        labels = as_window(encoded).labels
        for cut in windows(encoded.ids, window):
            wanted = labels[cut.start : cut.start + len(cut.ids)]
            if any(label != IGNORED for label in wanted):
                found.append(Window(cut.start, cut.ids, wanted))
                places.append(corpus.place(number))
    return InMemoryDataset(found, places)
