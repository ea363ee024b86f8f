"""Padding-free batches.

Each epoch is shuffled by a generator that depends only on the seed and the epoch's number. So a run
that resumes in the middle of an epoch sees the same batches as an uninterrupted run.
"""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from pipeline.data.examples import IGNORED, Window
from pipeline.data.windows import Dataset
from pipeline.models.base import CausalLM
from pipeline.models.device import to_device
from pipeline.project.params.sections import Training
from pipeline.training.parallel.collectives import shard_for_rank, world_size

# Held-out examples that are divided into batches together where a batch is filled with tokens.
HELD_OUT = 512


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


def pack(sizes: Sequence[int], most: int, parts: int = 1) -> list[list[int]]:
    """The indices of `sizes` in few bins that hold at most `most`; a larger size stands alone.

    First-fit decreasing says how many bins there are, rounded up to a multiple of `parts`. Then
    they are made as equal as it can (MULTIFIT, Coffman et al. 1978): equal batches need the least
    memory, and no rank waits for another.
    """
    decreasing = sorted(range(len(sizes)), key=lambda n: -sizes[n])

    def first_fit(capacity: int) -> list[list[int]]:
        bins, room = list[list[int]](), list[int]()
        for n in decreasing:
            number = next((b for b, left in enumerate(room) if left >= sizes[n]), len(bins))
            if number == len(bins):
                bins.append([])
                room.append(capacity)
            bins[number].append(n)
            room[number] -= sizes[n]
        return bins

    bins = first_fit(most)
    count = -(-len(bins) // parts) * parts
    fullest = max(sum(sizes[n] for n in numbers) for numbers in bins)
    low, high = sum(sizes) // count, min(most, fullest)
    while low < high:
        middle = (low + high) // 2
        equal = first_fit(middle)
        if len(equal) > count:
            low = middle + 1
        else:
            bins, high = equal, middle
    return [sorted(numbers) for numbers in bins]


class Batches:
    """The batches of all epochs.

    A step has `gradient_accumulation_steps` of them; with `tokens_per_batch` the same sequences in
    as few as hold at most so many tokens each.
    """

    def __init__(
        self,
        windows: Dataset,
        batch_size: int,
        seed: int | None,
        gradient_accumulation_steps: int = 1,
        first: int = 0,
        tokens_per_batch: int = 0,
    ) -> None:
        """`seed`: of the order of each epoch; None keeps the order of the windows.

        `first`: the steps of a run that this one continues; step 0 is the one after them.
        """
        self.dataset, self._batch_size, self._seed = windows, batch_size, seed
        self._step_size = batch_size * gradient_accumulation_steps  # sequences
        self.tokens_per_batch = tokens_per_batch  # on a device; 0: batch_size decides
        # of one epoch only: a data set may have millions of windows
        self._epoch, self._rows = 0, self._shuffle(0)
        self._last: int | None = None  # the step that was read last
        # the step whose batches were made ahead, and its batches
        self._ahead: tuple[int, list[Batch]] | None = None
        self.first = first

    @classmethod
    def of(cls, dataset: Dataset, settings: Training, first: int = 0) -> Self:
        """The batches to train on, by a stage's settings."""
        return cls(
            dataset,
            settings.batch_size,
            settings.seed,
            settings.gradient_accumulation_steps,
            first,
            settings.tokens_per_batch,
        )

    @classmethod
    def held_out(cls, dataset: Dataset, settings: Training) -> Self:
        """The batches to evaluate on, in their order."""
        tokens, size = settings.tokens_per_batch, settings.batch_size
        return cls(dataset, max(size, HELD_OUT) if tokens else size, None, tokens_per_batch=tokens)

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
        rows = self.rows(step)
        if not self.tokens_per_batch:
            return [self._batch_for_rank(shard_for_rank(numbers), numbers) for numbers in rows]
        # every world_size-th of the batches
        shards = shard_for_rank(rows)
        rounds = -(-len(rows) // world_size())
        shards += [[]] * (rounds - len(shards))
        return [self._batch_for_rank(numbers, rows[-1]) for numbers in shards]

    def _batch_for_rank(self, numbers: Sequence[int], others: Sequence[int]) -> Batch:
        """The windows `numbers`; a rank that gets none runs the first of `others` idly."""
        batch = self._collate(numbers or others[:1])
        return batch if numbers else batch.as_idle()

    def _collate(self, numbers: Sequence[int]) -> Batch:
        return collate([self.dataset[number] for number in numbers])

    def longest_alone(self, step: int) -> Batch:
        """A batch of the longest sequence, or pair of answers, in the step's first batch."""
        return self._collate([max(self.rows(step)[0], key=self.dataset.tokens)])

    def locations(self, step: int) -> list[str]:
        """`file:line` of each example in a step, without duplicates."""
        return list(dict.fromkeys(map(self.dataset.location, self.windows(step))))

    def largest_step(self, steps: Iterable[int]) -> int:
        """Of `steps`, the step whose largest batch has the most tokens; the first if several do."""
        return max(
            steps,
            key=lambda step: max(sum(map(self.dataset.tokens, rows)) for rows in self.rows(step)),
        )

    def rows(self, step: int) -> list[list[int]]:
        """The indices of the windows in each batch of a step, on all ranks together."""
        numbers = self.windows(step)
        if self.tokens_per_batch:
            sizes = [*map(self.dataset.tokens, numbers)]
            bins = pack(sizes, self.tokens_per_batch, world_size())
            return [[numbers[n] for n in places] for places in bins]
        return [
            numbers[start : start + self._batch_size]
            for start in range(0, len(numbers), self._batch_size)
        ]

    def windows(self, step: int) -> list[int]:
        """The indices of a step's windows, on all ranks, in the epoch's order."""
        epoch, index = divmod(self.first + step, len(self))
        if self._epoch != epoch:
            self._epoch, self._rows = epoch, self._shuffle(epoch)
        return self._rows[index * self._step_size : (index + 1) * self._step_size]

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
