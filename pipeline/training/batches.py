"""Sequences as tensors without padding, shuffled anew each epoch from the seed and the epoch alone.

So a resumed run, which starts in the middle of an epoch, sees what an unbroken one sees.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.data.examples import IGNORED, Window
from pipeline.data.windows import Dataset
from pipeline.training.distributed.collectives import shard_for_rank


@dataclass(frozen=True)
class Batch:
    """ids and positions (B, T); `labels` (N,) of the rows `at` (N,) of the flattened tokens, or of all: `at` is None.

    Sequences of one length are B rows; others lie end to end in one row, and `segments` are their lengths.
    """

    ids: Tensor
    positions: Tensor
    labels: Tensor
    at: Tensor | None
    segments: tuple[int, ...] | None = None
    numbers: tuple[int, ...] = ()  # of its sequences
    idle: bool = False  # read only so that every process runs the model equally often: it counts for nothing

    @property
    def tokens(self) -> int:
        """Labels that count."""
        return 0 if self.idle else len(self.labels)

    @property
    def read(self) -> int:
        """Tokens that are read, and count."""
        return 0 if self.idle else self.ids.numel()

    def to(self, device: torch.device) -> "Batch":
        moved = {name: getattr(self, name).to(device) for name in ("ids", "positions", "labels")}
        return replace(self, **moved, at=None if self.at is None else self.at.to(device))

    def unpack(self) -> list["Batch"]:
        """Each sequence as a batch of its own, for a model that cannot read them end to end."""
        if self.segments is None:
            return [self]
        kept = torch.arange(self.ids.numel()) if self.at is None else self.at
        labels = torch.full((self.ids.numel(),), IGNORED).index_put((kept,), self.labels)
        parts = zip(
            *(torch.split(t, list(self.segments)) for t in (self.ids[0], self.positions[0], labels)), strict=True
        )
        made = (batch_of(_tensors(*part), None, self.numbers[i : i + 1]) for i, part in enumerate(parts))
        return [replace(one, idle=self.idle) for one in made]


def shared(windows: Dataset, numbers: Sequence[int]) -> Batch:
    """This process's share of the windows with these numbers: all of them, where it is alone."""
    own = shard_for_rank(numbers)
    batch = collate([windows[number] for number in own or numbers[:1]], own or numbers[:1])
    return batch if own else replace(batch, idle=True)


def collate(windows: Sequence[Window], numbers: Sequence[int] = ()) -> Batch:
    """One batch of all `windows`; their tokens after the last label are left out: nothing reads them."""
    kept = [_trimmed(window) for window in windows]
    lengths = tuple(len(window.ids) for window in kept)
    columns = (
        [id_ for w in kept for id_ in w.ids],
        [w.start + t for w in kept for t in range(len(w.ids))],
        [label for w in kept for label in w.labels],
    )
    table = torch.tensor(columns)
    segments = lengths if len(set(lengths)) > 1 else None
    return batch_of(table if segments else table.view(3, len(kept), -1), segments, tuple(numbers))


def batch_of(table: Tensor, segments: tuple[int, ...] | None, numbers: tuple[int, ...]) -> Batch:
    """From ids, positions and labels (3, N) of one row or (3, B, T)."""
    ids, positions, labels = table if table.dim() == 3 else table[:, None]
    flat = labels.flatten()
    at = (flat != IGNORED).nonzero().flatten()
    whole = len(at) == len(flat)
    return Batch(ids, positions, flat if whole else flat[at], None if whole else at, segments, numbers)


def _tensors(*parts: Tensor) -> Tensor:
    return torch.stack(parts)


def _trimmed(window: Window) -> Window:
    last = max((i for i, label in enumerate(window.labels) if label != IGNORED), default=-1)
    if last + 1 == len(window.ids):
        return window
    return Window(window.start, window.ids[: last + 1], window.labels[: last + 1])


class Batches:
    """The batches of every epoch; `accumulate` of them make one step."""

    def __init__(self, windows: Dataset, batch_size: int, seed: int, accumulate: int = 1) -> None:
        self._windows, self._size, self._seed, self._accumulate = windows, batch_size, seed, accumulate
        self._epoch, self._rows = 0, self._shuffled(0)

    def __len__(self) -> int:
        """Steps an epoch; the last may be smaller."""
        return -(-len(self._windows) // (self._size * self._accumulate))

    def __getitem__(self, step: int) -> list[Batch]:
        """This process's share of the batches of step `step`, counted from 0 over all epochs."""
        return [shared(self._windows, rows) for rows in self.rows(step)]

    @property
    def source(self) -> Dataset:
        """All the windows, by number."""
        return self._windows

    def places(self, step: int) -> list[str]:
        """Where the examples of a step stand in their files, each once."""
        rows = (row for rows in self.rows(step) for row in rows)
        return list(dict.fromkeys(self._windows.location(row) for row in rows))

    def largest(self, steps: Iterable[int]) -> int:
        """The step, of these, whose largest batch has the most tokens; the first of equals."""
        return max(steps, key=lambda step: max(map(self._tokens, self.rows(step))))

    def _tokens(self, rows: Sequence[int]) -> int:
        return sum(map(self._windows.tokens, rows))

    def rows(self, step: int) -> list[list[int]]:
        """The numbers of the windows in each batch of a step."""
        epoch, index = divmod(step, len(self))
        if self._epoch != epoch:
            self._epoch, self._rows = epoch, self._shuffled(epoch)
        wide = self._size * self._accumulate
        rows = self._rows[index * wide : (index + 1) * wide]
        return [rows[start : start + self._size] for start in range(0, len(rows), self._size)]

    def _shuffled(self, epoch: int) -> list[int]:
        rows = list(range(len(self._windows)))
        random.Random(f"{self._seed}/{epoch}").shuffle(rows)
        return rows
