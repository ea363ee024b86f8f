"""Many adapters that train on one frozen base, in one forward and one backward pass."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.adapters.batched import AdapterRouting
from pipeline.data.examples import IGNORED, Window
from pipeline.data.windows import Dataset, InMemoryDataset
from pipeline.models.base import CausalLM
from pipeline.training.batches import Batch, Batches, collate, pack
from pipeline.training.losses import Head, cross_entropy, mean_loss
from pipeline.training.retention import RetentionLoss
from pipeline.training.step import LossPath, StepBatch

# Most logits that are computed at once, 16 MiB in fp32: a small model's step is bound by calls.
# More are computed for one adapter after the other, in chunks.
LOGITS = 2**22


class ManyAdapters(LossPath):
    """The path of a model whose learners are the adapters of `routing`."""

    def __init__(self, model: CausalLM, routing: AdapterRouting) -> None:
        super().__init__(model)
        self._routing = routing
        # id of a dataset (of training, evaluation or retention) → its `_stack_windows`
        self._tables: dict[int, Tensor | None] = {}

    @cached_property
    def supports_packing(self) -> bool:
        """Whether the base packs: tried without adapters at the first use, on the model's device."""
        with self.base():
            return self._model.supports_packing

    def base(self) -> AbstractContextManager[None]:
        return self._routing.base()

    def batches(self, orders: Mapping[int, Batches], number: int) -> Iterator[StepBatch]:
        """One batch per micro-batch of the step; if the model does not pack, one per window."""
        first = next(iter(orders.values()))
        windows = first.dataset
        if first.tokens_per_batch:
            for rows in _pack_together(orders, number, first.tokens_per_batch):
                yield from self._read(windows, rows)
            return
        batches = {n: order.rows(number) for n, order in orders.items()}
        for index in range(max(map(len, batches.values()))):
            rows = {n: batch[index] for n, batch in batches.items() if index < len(batch)}
            yield from self._read(windows, rows)

    def _read(self, windows: Dataset, rows: Mapping[int, Sequence[int]]) -> Iterator[StepBatch]:
        if id(windows) not in self._tables:
            self._tables[id(windows)] = _stack_windows(windows)
        table = self._tables[id(windows)]
        if table is not None and len({len(numbers) for numbers in rows.values()}) == 1:
            # windows of equal length that are labelled throughout: a row per adapter if packing is
            # faster
            table = table[:, torch.tensor([*rows.values()])]  # (3, L, b, T)
            _, L, b, T = table.shape
            packed = b * T <= self._model.pack_up_to
            # (L, b·T) or (L·b, T)
            ids, positions, labels = table.view(3, L, -1) if packed else table.view(3, -1, T)
            batch = Batch(ids, positions, labels.flatten(), None, (T,) * b if packed else None)
            tokens = dict.fromkeys(rows, b * T)
            yield self._step_batch(batch, tokens, tokens)
            return
        pairs = list[tuple[int, Window]]()
        for n, numbers in rows.items():
            pairs += [(n, windows[number]) for number in numbers]
        joint = self._collate(pairs)
        if joint.batch.segments is not None and not self.supports_packing:
            yield from (self._collate([pair]) for pair in pairs)
        else:
            yield joint

    def _collate(self, pairs: Sequence[tuple[int, Window]]) -> StepBatch:
        batch = collate([window for _, window in pairs])
        input_tokens, labels = dict.fromkeys(dict(pairs), 0), dict.fromkeys(dict(pairs), 0)
        lengths = batch.segments or [batch.ids.shape[1]] * len(pairs)
        for (number, window), length in zip(pairs, lengths, strict=True):
            input_tokens[number] += length
            labels[number] += len(window.labels) - window.labels.count(IGNORED)
        return self._step_batch(batch, input_tokens, labels)

    def _step_batch(
        self, batch: Batch, input_tokens: Mapping[int, int], labels: Mapping[int, int]
    ) -> StepBatch:
        labelled = {n: count for n, count in labels.items() if count}
        return StepBatch(batch.to(self._model.device), labelled, self._counts(input_tokens))

    def _counts(self, by_learner: Mapping[int, int]) -> tuple[int, ...]:
        return tuple(by_learner.get(n, 0) for n in range(len(self._routing.counts)))

    def route(self, batch: StepBatch) -> AbstractContextManager[None]:
        # also in backward: checkpointed blocks run again
        return self._routing.route(batch.input_tokens)

    def losses(self, batch: StepBatch) -> Tensor:
        model, inputs, counts = self._model, batch.batch, list(batch.labels.values())
        rows = inputs.read_by(model)  # (N, D)
        rows = rows if inputs.label_index is None else rows.index_select(0, inputs.label_index)
        if len(set(counts)) == 1 and len(rows) * model.shape.rows <= LOGITS:
            with self._routing.route(self._counts(batch.labels)):
                logits = model.logits(rows).float()
            losses = F.cross_entropy(logits, inputs.labels, reduction="none")  # (N,)
            return losses.view(len(counts), -1).mean(1)
        means = []
        parts = torch.split(rows, counts), torch.split(inputs.labels, counts)
        for n, x, y in zip(batch.labels, *parts, strict=True):
            means.append(mean_loss(model, cross_entropy(self._head(n)), x, y))
        return torch.stack(means)

    def divergences(self, batch: StepBatch, retain: RetentionLoss) -> Tensor:
        heads = {n: self._head(n) for n in batch.labels}
        counts = [batch.input_tokens[n] for n in heads]
        return retain.divergences(batch.batch, counts, [*heads.values()])

    def _head(self, number: int) -> Head:
        """The logits function of one adapter."""

        def head(rows: Tensor) -> Tensor:
            with self._routing.route(self._counts({number: len(rows)})):
                return self._model.logits(rows)

        return head


def _pack_together(
    orders: Mapping[int, Batches], number: int, most: int
) -> Iterator[dict[int, list[int]]]:
    """Learner → its windows in each batch of step `number`, of `most` tokens of all learners."""
    pairs = list[tuple[int, int]]()
    sizes = list[int]()
    for n, order in orders.items():
        for window in order.windows(number):
            pairs.append((n, window))
            sizes.append(order.dataset.tokens(window))
    for places in pack(sizes, most):
        rows: dict[int, list[int]] = {}
        for place in places:
            n, window = pairs[place]
            rows.setdefault(n, []).append(window)
        yield rows


def _stack_windows(windows: Dataset) -> Tensor | None:
    """Ids, positions and labels (3, n, T) of windows in memory.

    None if lengths differ or a token has no label.
    """
    in_memory = windows.windows if isinstance(windows, InMemoryDataset) else []
    if len({len(w.ids) for w in in_memory}) != 1 or any(IGNORED in w.labels for w in in_memory):
        return None
    ids = [list(w.ids) for w in in_memory]
    positions = [list(range(w.start, w.start + len(w.ids))) for w in in_memory]
    labels = [list(w.labels) for w in in_memory]
    return torch.tensor([ids, positions, labels])
