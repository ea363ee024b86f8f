"""Padding-free batches.

Each epoch is shuffled by a generator that depends only on the seed and the epoch's number. So a run
that resumes in the middle of an epoch sees the same batches as an uninterrupted run.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor

from pipeline.data.examples import IGNORED, Window
from pipeline.data.windows import Dataset
from pipeline.models.base import CausalLM
from pipeline.models.device import to_device
from pipeline.training.parallel.collectives import shard_for_rank


@dataclass(frozen=True)
class Batch:
    """Sequences of equal length in B rows, or others packed into one row, and N labels."""

    ids: Tensor  # (B, T)
    positions: Tensor  # (B, T)
    labels: Tensor  # (N,), without IGNORED
    label_index: Tensor | None  # (N,), of the B·T flattened tokens; None: every one has a label
    segments: tuple[int, ...] | None = None  # lengths of packed sequences
    idle: bool = False  # run only so that all ranks call the model equally often; weighs 0
    in_chunks: ClassVar[bool] = False  # whether logits are computed in chunks even if there are few

    @property
    def tokens(self) -> int:
        """Number of labels; 0 if the batch is idle."""
        return 0 if self.idle else len(self.labels)

    def read_by(self, model: CausalLM) -> Tensor:
        """(B·T, D): the hidden states of all its tokens."""
        return model.hidden_states(self.ids, self.positions, self.segments).flatten(0, 1)

    def as_idle(self) -> "Batch":
        """The same, weighing nothing."""
        return replace(self, idle=True)

    def to(self, device: torch.device) -> "Batch":
        """The same on `device`. One copy moves its int64 tensors; the host does not wait for it."""
        if self.ids.device == device:
            return self
        moved, whole = dict[str, Any](), dict[str, Tensor]()
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and value.dtype == torch.int64:
                whole[name] = value
            elif isinstance(value, Tensor):
                moved[name] = to_device(value, device)
        table = to_device(torch.cat([value.reshape(-1) for value in whole.values()]), device)
        parts = table.split_with_sizes([value.numel() for value in whole.values()])
        for (name, value), part in zip(whole.items(), parts, strict=True):
            moved[name] = part.view(value.shape)
        return replace(self, **moved)

    def unpack(self) -> list["Batch"]:
        """One batch per sequence, for models that do not support packing."""
        if self.segments is None:
            return [self]
        total = self.ids.numel()
        device = self.ids.device
        index = self.label_index
        if index is None:
            index = torch.arange(total, device=device)
        labels = torch.full((total,), IGNORED, device=device).index_put((index,), self.labels)
        table = torch.stack((self.ids[0], self.positions[0], labels))  # (3, ΣT)
        parts = table.split_with_sizes([*self.segments], 1)
        return [replace(_batch_from(part, None), idle=self.idle) for part in parts]


def collate(windows: Sequence[Window]) -> Batch:
    """One batch of all `windows`, each cut after its last label, as later tokens affect no loss.

    Nothing is padded: equal lengths are stacked into B rows, others lie end to end in one.
    """
    lengths: list[int] = []
    ids: list[int] = []
    positions: list[int] = []
    labels: list[int] = []
    for window in windows:
        stop = len(window.labels)
        while stop and window.labels[stop - 1] == IGNORED:
            stop -= 1
        lengths.append(stop)
        ids += window.ids[:stop]
        positions += range(window.start, window.start + stop)
        labels += window.labels[:stop]
    # (3, ΣT): one call for all three: small models are bound by calls
    table = torch.tensor((ids, positions, labels))
    segments = tuple(lengths) if len(set(lengths)) > 1 else None
    if segments is None:
        table = table.view(3, len(windows), -1)  # (3, B, T)
    return _batch_from(table, segments, IGNORED not in labels)


def _batch_from(
    table: Tensor, segments: tuple[int, ...] | None, all_labelled: bool = False
) -> Batch:
    """The batch of a table of ids, positions and labels: (3, T) for one row, or (3, B, T).

    `all_labelled`: every token is known to have a label.
    """
    ids, positions, labels = (table if table.dim() == 3 else table[:, None]).unbind()  # (B, T) each
    flat = labels.flatten()
    index = None if all_labelled else (flat != IGNORED).nonzero().flatten()  # (N,)
    if index is None or len(index) == len(flat):
        return Batch(ids, positions, flat, None, segments)
    return Batch(ids, positions, flat[index], index, segments)


class Batches:
    """The batches of all epochs; a step has `gradient_accumulation_steps` of them."""

    def __init__(
        self,
        windows: Dataset,
        batch_size: int,
        seed: int | None,
        gradient_accumulation_steps: int = 1,
        first: int = 0,
    ) -> None:
        """`seed`: of the order of each epoch; None keeps the order of the windows.

        `first`: the steps of a run that this one continues; step 0 is the one after them.
        """
        self.dataset, self._batch_size, self._seed = windows, batch_size, seed
        self._step_size = batch_size * gradient_accumulation_steps  # sequences
        # of one epoch only: a data set may have millions of windows
        self._epoch, self._rows = 0, self._shuffle(0)
        self._last: int | None = None  # the step that was read last
        # the step whose batches were made ahead, and its batches
        self._ahead: tuple[int, list[Batch]] | None = None
        self.first = first

    def __len__(self) -> int:
        """Steps per epoch; the last may have fewer sequences."""
        return -(-len(self._rows) // self._step_size)

    def __getitem__(self, step: int) -> list[Batch]:
        """The batches of step `step` for this rank; steps are counted from 0 over all epochs."""
        self._last = step
        if self._ahead is not None and self._ahead[0] == step:
            return self._ahead[1]
        return self._read(step)

    def read_ahead(self) -> None:
        """Make the next step's batches while an accelerator still computes the last one read."""
        if self._last is not None:
            self._ahead = self._last + 1, self._read(self._last + 1)

    def _read(self, step: int) -> list[Batch]:
        return [self._batch_for_rank(numbers) for numbers in self.rows(step)]

    def _batch_for_rank(self, numbers: Sequence[int]) -> Batch:
        """Every world_size-th of the windows `numbers`, all of them in a single process.

        A rank that gets none runs the first window as an idle batch.
        """
        indices = shard_for_rank(numbers)
        batch = self._collate(indices or numbers[:1])
        return batch if indices else batch.as_idle()

    def _collate(self, numbers: Sequence[int]) -> Batch:
        return collate([self.dataset[number] for number in numbers])

    def longest_alone(self, step: int) -> Batch:
        """A batch of the longest sequence, or pair of answers, in the step's first batch."""
        return self._collate([max(self.rows(step)[0], key=self.dataset.tokens)])

    def locations(self, step: int) -> list[str]:
        """`file:line` of each example in a step, without duplicates."""
        rows = chain.from_iterable(self.rows(step))
        return list(dict.fromkeys(map(self.dataset.location, rows)))

    def largest_step(self, steps: Iterable[int]) -> int:
        """Of `steps`, the step whose largest batch has the most tokens; the first if several do."""
        return max(
            steps,
            key=lambda step: max(sum(map(self.dataset.tokens, rows)) for rows in self.rows(step)),
        )

    def rows(self, step: int) -> list[list[int]]:
        """The indices of the windows in each batch of a step, on all ranks together."""
        epoch, index = divmod(self.first + step, len(self))
        if self._epoch != epoch:
            self._epoch, self._rows = epoch, self._shuffle(epoch)
        rows = self._rows[index * self._step_size : (index + 1) * self._step_size]
        return [
            rows[start : start + self._batch_size]
            for start in range(0, len(rows), self._batch_size)
        ]

    def _shuffle(self, epoch: int) -> list[int]:
        """The windows of an epoch, in its order. Every epoch has equally many."""
        # Python's generator, seeded by a string: it hashes the string by SHA-512, so the order is
        # the same on every machine and with every version of torch
        rows = list[int]()
        for run, weight in self.dataset.parts:
            times, part = divmod(weight, 1)
            rows += [*run] * int(times)
            if part and run:  # other ones in each epoch, and at least one of them
                chosen = random.Random(f"{self._seed}/{epoch}/{run.start}")
                rows += chosen.sample(run, max(1, round(part * len(run))))
        if self._seed is not None:
            random.Random(f"{self._seed}/{epoch}").shuffle(rows)
        return rows
