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
        ids = [_padded(w.ids, T, pad_id) for w in windows]
        labels = [_padded(w.labels, T, IGNORED) for w in windows]
        positions = [_padded(range(w.start, w.start + len(w.ids)), T, 0) for w in windows]
        self._table = torch.tensor([ids, labels, positions])  # (3, windows, T)
        self._tokens = [len(window.ids) for window in windows]
        self._size, self._seed = batch_size, seed
        self.size, self.length = min(batch_size, len(windows)), T  # of a full batch: rows, tokens a row
        self._epoch, self._batches = 0, self._shuffled(0)

    def __len__(self) -> int:
        """Batches an epoch; the last may be smaller."""
        return -(-len(self._tokens) // self._size)

    def __getitem__(self, step: int) -> Batch:
        """The batch of step `step`, counted from 0 over all epochs."""
        epoch, index = divmod(step, len(self))
        if self._epoch != epoch:
            self._epoch, self._batches = epoch, self._shuffled(epoch)
        return self._batches[index]

    def _shuffled(self, epoch: int) -> list[Batch]:
        rows = list(range(len(self._tokens)))
        random.Random(f"{self._seed}/{epoch}").shuffle(rows)
        ids, labels, positions = self._table[:, rows]
        tokens = [self._tokens[row] for row in rows]
        cuts = [slice(start, start + self._size) for start in range(0, len(rows), self._size)]
        return [Batch(ids[cut], labels[cut], positions[cut], sum(tokens[cut])) for cut in cuts]


def _padded(values: Sequence[int], length: int, filler: int) -> list[int]:
    return [*values, *[filler] * (length - len(values))]
