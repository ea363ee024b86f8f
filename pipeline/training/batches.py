"""Windows as tensors, shuffled anew each epoch from the seed and the epoch alone, so that a resumed run agrees."""

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.data import IGNORED, Window


@dataclass(frozen=True)
class Batch:
    """ids, labels and positions, each (B, T); a label that is IGNORED does not count."""

    ids: Tensor
    labels: Tensor
    positions: Tensor
    tokens: int  # labels that count


class Batches:
    """The batches of every epoch."""

    def __init__(self, windows: Sequence[Window], batch_size: int, seed: int, pad_id: int) -> None:
        T = max(len(window.ids) for window in windows)
        self._ids = torch.tensor([_padded(w.ids, T, pad_id) for w in windows])
        self._labels = torch.tensor([_padded(w.labels, T, IGNORED) for w in windows])
        self._positions = torch.tensor([_padded(range(w.start, w.start + len(w.ids)), T, 0) for w in windows])
        self._tokens = [len(window.ids) for window in windows]
        self._size, self._seed = batch_size, seed
        self._epoch, self._rows = 0, self._shuffled(0)

    def __len__(self) -> int:
        """Batches an epoch; the last may be smaller."""
        return -(-len(self._tokens) // self._size)

    def __getitem__(self, step: int) -> Batch:
        """The batch of step `step`, counted from 0 over all epochs."""
        epoch, index = divmod(step, len(self))
        if self._epoch != epoch:
            self._epoch, self._rows = epoch, self._shuffled(epoch)
        return self._batch(self._rows[index * self._size : (index + 1) * self._size])

    def _shuffled(self, epoch: int) -> list[int]:
        rows = list(range(len(self._tokens)))
        random.Random(f"{self._seed}/{epoch}").shuffle(rows)
        return rows

    def _batch(self, rows: list[int]) -> Batch:
        tokens = sum(self._tokens[row] for row in rows)
        return Batch(self._ids[rows], self._labels[rows], self._positions[rows], tokens)


def _padded(values: Sequence[int], length: int, filler: int) -> list[int]:
    return [*values, *[filler] * (length - len(values))]
