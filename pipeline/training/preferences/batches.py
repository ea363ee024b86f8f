"""Pairs of answers as a data set and in batches.

A unit of the data is two sequences: the chosen and the rejected answer to a prompt, or for KTO an
answer and another example's answer behind the same prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from pipeline.data.examples import IGNORED, Window
from pipeline.data.windows import Parts
from pipeline.training.batches import Batch, Batches, collate


@dataclass(frozen=True)
class Answers:
    """The sequences of a data set, two a unit."""

    windows: Sequence[Window]
    source: Callable[[int], str]  # where a unit is from, as file:line
    parts: Parts
    # log-probability of each sequence's answer under the reference, (2n,); None without a reference
    reference: Tensor | None = None
    desirable: Sequence[bool] = ()  # for KTO, whether each unit's answer is a good one
    # for ORPO, whose likelihood is of prompt and answer: whether every token of a first sequence
    # carries a label
    whole: bool = False

    def __len__(self) -> int:
        return len(self.windows) // 2

    def __getitem__(self, number: int) -> Window:
        """The unit's first sequence; its second is `windows[2 * number + 1]`."""
        return self.windows[2 * number]

    def tokens(self, number: int) -> int:
        first, second = self.windows[2 * number], self.windows[2 * number + 1]
        return len(first.ids) + len(second.ids)

    def location(self, number: int) -> str:
        return self.source(number)


@dataclass(frozen=True)
class AnswerBatch(Batch):
    """The n first sequences of n units, then their n second ones; for KTO the first ones alone.

    All is made on the CPU: a GPU would be waited for.
    """

    in_chunks: ClassVar[bool] = True

    units: int = 0
    counts: tuple[int, ...] = ()  # labels of each sequence, of the N in the batch
    answered: Tensor | None = None  # indices of the labels of an answer; None: all are
    owner: Tensor | None = None  # the sequence of each label of an answer
    of_each: Tensor | None = None  # how many labels each answer has
    # of the mean over the labels of the first sequences, while batches count by their units
    nll_weight: float = 1.0
    reference: Tensor | None = None  # per sequence
    # KTO
    desirable: Tensor | None = None  # (n,), 1 or 0
    liked: int = 0  # units that are desirable
    by_kind: Tensor | None = None  # (n,) the units, the desirable ones first
    mismatched: "AnswerBatch | None" = None  # the second sequences

    def as_idle(self) -> "AnswerBatch":
        return replace(self, idle=True, units=0)

    def to(self, device: torch.device) -> "AnswerBatch":
        batch = super().to(device)
        assert isinstance(batch, AnswerBatch)
        if self.mismatched is None:
            return batch
        return replace(batch, mismatched=self.mismatched.to(device))


class AnswerBatches(Batches):
    """The batches of all epochs, of units of Answers; both answers of a unit are in one batch."""

    def _read(self, step: int) -> list[Batch]:
        batches = super()._read(step)
        if not self.tokens_per_batch:
            return batches
        # however the units are divided, every label has the same weight in the step
        units, weighted = self.windows(step), list[Batch]()
        of_step = sum(map(self._first_labels, units)) / len(units)
        for batch in batches:
            assert isinstance(batch, AnswerBatch)
            labels = sum(batch.counts[: batch.units])
            weight = labels / max(batch.units, 1) / of_step
            weighted.append(replace(batch, nll_weight=weight))
        return weighted

    def _first_labels(self, unit: int) -> int:
        """The labels of a unit's first sequence in its batch."""
        assert isinstance(self.dataset, Answers)
        return _stop(self.dataset[unit]) if self.dataset.whole else _labels(self.dataset[unit])

    def _collate(self, numbers: Sequence[int]) -> AnswerBatch:
        assert isinstance(self.dataset, Answers)
        return answer_batch(self.dataset, numbers)


def answer_batch(answers: Answers, units: Sequence[int]) -> AnswerBatch:
    """The units as one batch."""
    firsts, seconds = [2 * unit for unit in units], [2 * unit + 1 for unit in units]
    if not answers.desirable:
        batch = batch_of(answers, [*firsts, *seconds], len(units) if answers.whole else 0)
        return replace(batch, units=len(units))
    kinds = [int(answers.desirable[unit]) for unit in units]
    desirable_first = sorted(range(len(units)), key=lambda n: not kinds[n])
    return replace(
        batch_of(answers, firsts),
        units=len(units),
        desirable=torch.tensor(kinds),
        liked=sum(kinds),
        by_kind=torch.tensor(desirable_first),
        mismatched=batch_of(answers, seconds),
    )


def batch_of(answers: Answers, indices: Sequence[int], whole: int = 0) -> AnswerBatch:
    """The sequences `indices` as a batch of no units.

    The first `whole` of them have a label for every token up to their last label.
    """
    windows = [answers.windows[index] for index in indices]
    counts = [_labels(window) for window in windows]
    answered, of_each = None, torch.tensor(counts)
    if whole:
        marks = list[bool]()
        for n in range(whole):
            start, ids, labels = windows[n].start, windows[n].ids, windows[n].labels
            stop = _stop(windows[n])
            marks += [label != IGNORED for label in labels[:stop]]
            # what follows each token as its label
            windows[n] = Window(start, ids[:stop], (*ids[1:stop], labels[stop - 1]))
        marks += [True] * sum(counts[whole:])
        answered = torch.tensor(marks).nonzero()[:, 0]
    return AnswerBatch(
        **vars(collate(windows)),
        counts=tuple(_labels(window) for window in windows),
        answered=answered,
        owner=torch.repeat_interleave(of_each),
        of_each=of_each,
        reference=None if answers.reference is None else answers.reference[[*indices]],
    )


def _stop(window: Window) -> int:
    """The tokens up to the last label."""
    return 1 + max(i for i, label in enumerate(window.labels) if label != IGNORED)


def _labels(window: Window) -> int:
    return len(window.labels) - window.labels.count(IGNORED)
