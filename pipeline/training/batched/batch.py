"""Batches that hold sequences of many adapters, and the loss of each adapter."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.adapters.batched import AdapterRouting
from pipeline.data.examples import IGNORED, Window
from pipeline.data.windows import Dataset, InMemoryDataset
from pipeline.models.base import CausalLM
from pipeline.training.batches import Batch, collate
from pipeline.training.losses import CHUNK, Head, chunked_mean, cross_entropy, divergence

LOGITS = 2**22  # computed at once at most; beyond it per adapter, CHUNK rows at a time


@dataclass(frozen=True)
class MultiAdapterBatch:
    """A batch with adapter 0's sequences first, then adapter 1's, …; `input_tokens` and `labels` count per adapter."""

    batch: Batch
    input_tokens: tuple[int, ...]
    labels: tuple[int, ...]


class Reader:
    """Builds the batches of many adapters from the windows that they share."""

    def __init__(self, model: CausalLM, routing: AdapterRouting, windows: Dataset) -> None:
        self._model, self._windows, self._adapters = model, windows, len(routing.counts)
        self._table = _stack_windows(windows)
        with routing.base():  # the packing test runs without adapters
            self.supports_packing = model.supports_packing

    def batches(self, rows: Mapping[int, Sequence[int]]) -> Iterator[MultiAdapterBatch]:
        """Batches of the windows `rows` (adapter index → window indices): one, or one per window without packing."""
        owners = sorted(rows)
        counts = {len(rows[n]) for n in owners}
        if self._table is not None and len(counts) == 1:
            yield self._collate_rows([rows[n] for n in owners], owners)
            return
        pairs = [(n, self._windows[row]) for n in owners for row in rows[n]]
        joint = self._collate(pairs)
        if joint.batch.segments is not None and not self.supports_packing:
            yield from (self._collate([pair]) for pair in pairs)
        else:
            yield joint

    def _collate(self, pairs: Sequence[tuple[int, Window]]) -> MultiAdapterBatch:
        batch = collate([window for _, window in pairs])
        lengths = batch.segments or [batch.ids.shape[1]] * len(pairs)
        input_tokens, labels = [0] * self._adapters, [0] * self._adapters
        for (number, window), length in zip(pairs, lengths, strict=True):
            input_tokens[number] += length
            labels[number] += len(window.labels) - window.labels.count(IGNORED)
        return MultiAdapterBatch(batch.to(self._model.device), tuple(input_tokens), tuple(labels))

    def _collate_rows(self, rows: Sequence[Sequence[int]], owners: Sequence[int]) -> MultiAdapterBatch:
        """The same for windows of equal length that are labelled throughout: a row per adapter if packing is faster."""
        assert self._table is not None
        table = self._table[:, torch.tensor(rows)]  # (3, L, b, T)
        _, L, b, T = table.shape
        packed = b * T <= self._model.pack_up_to
        ids, positions, labels = table.view(3, L, -1) if packed else table.view(3, -1, T)  # (L, b·T) or (L·b, T)
        counts = [0] * self._adapters
        for number in owners:
            counts[number] = b * T
        batch = Batch(ids, positions, labels.flatten(), None, (T,) * b if packed else None)
        return MultiAdapterBatch(batch.to(self._model.device), tuple(counts), tuple(counts))


def _stack_windows(windows: Dataset) -> Tensor | None:
    """Ids, positions and labels (3, n, T) of windows in memory; None if lengths differ or a token has no label."""
    in_memory = windows.windows if isinstance(windows, InMemoryDataset) else []
    if len({len(w.ids) for w in in_memory}) != 1 or any(IGNORED in w.labels for w in in_memory):
        return None
    positions = [list(range(w.start, w.start + len(w.ids))) for w in in_memory]
    return torch.tensor([[list(w.ids) for w in in_memory], positions, [list(w.labels) for w in in_memory]])


def adapter_losses(model: CausalLM, routing: AdapterRouting, joint: MultiAdapterBatch) -> Tensor:
    """(L,): the mean cross-entropy of each adapter that has labels, in nats per token."""
    batch = joint.batch
    with routing.route(joint.input_tokens):
        rows = model.hidden_states(batch.ids, batch.positions, batch.segments).flatten(0, 1)  # (N, D)
    rows = rows if batch.label_index is None else rows.index_select(0, batch.label_index)
    counts = [count for count in joint.labels if count]
    if len(set(counts)) == 1 and len(rows) * model.shape.rows <= LOGITS:
        with routing.route(joint.labels):
            logits = model.logits(rows).float()
        return F.cross_entropy(logits, batch.labels, reduction="none").view(len(counts), -1).mean(1)
    trained = [p for p in model.head.parameters() if p.requires_grad]
    live = [number for number, count in enumerate(joint.labels) if count]
    parts = zip(live, torch.split(rows, counts), torch.split(batch.labels, counts), strict=True)
    return torch.stack(
        [chunked_mean(cross_entropy(_head(model, routing, n)), x, y, CHUNK, trained) for n, x, y in parts]
    )


def adapter_divergences(model: CausalLM, routing: AdapterRouting, joint: MultiAdapterBatch) -> Tensor:
    """(L,): the mean KL(base‖adapter) over the tokens of each adapter that has tokens, in nats."""
    batch = joint.batch
    with torch.no_grad(), routing.base():
        before = model.hidden_states(batch.ids, batch.positions, batch.segments).flatten(0, 1)  # (N, D)
    with routing.route(joint.input_tokens):
        after = model.hidden_states(batch.ids, batch.positions, batch.segments).flatten(0, 1)
    trained = [p for p in model.head.parameters() if p.requires_grad]
    live = [number for number, count in enumerate(joint.input_tokens) if count]
    counts = [joint.input_tokens[number] for number in live]

    def reference(rows: Tensor) -> Tensor:
        with routing.base():
            return model.logits(rows)

    parts = zip(live, torch.split(after, counts), torch.split(before, counts), strict=True)
    divergences = [
        chunked_mean(divergence(_head(model, routing, n), reference), x, y, CHUNK, trained) for n, x, y in parts
    ]
    return torch.stack(divergences)


def _head(model: CausalLM, routing: AdapterRouting, number: int) -> Head:
    """The logits function of one adapter."""

    def head(rows: Tensor) -> Tensor:
        with routing.route(routing.counts_for(number, len(rows))):
            return model.logits(rows)

    return head


LossFunction = Callable[[CausalLM, AdapterRouting, MultiAdapterBatch], Tensor]
