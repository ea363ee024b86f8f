"""What many adapters read in one forward, each its own sequences, and the loss of each."""

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
from pipeline.training.losses import CHUNK, Head, cross_entropy, divergence, mean_of

LOGITS = 2**22  # at once; more are made adapter by adapter, CHUNK rows at a time


@dataclass(frozen=True)
class MultiAdapterBatch:
    """A batch whose sequences are adapter 0's first, then adapter 1's; `read` tokens and `labels` of each adapter."""

    batch: Batch
    read: tuple[int, ...]
    labels: tuple[int, ...]


class Reader:
    """Makes what many adapters read of the windows that all of them learn from."""

    def __init__(self, model: CausalLM, share: AdapterRouting, windows: Dataset) -> None:
        self._model, self._windows, self._adapters = model, windows, len(share.counts)
        self._table = _table(windows)
        with share.base():  # what is read to try it is no adapter's
            self.supports_packing = model.supports_packing

    def joints(self, rows: Mapping[int, Sequence[int]]) -> Iterator[MultiAdapterBatch]:
        """The windows that each adapter, by its number, reads: together, or one by one for a model that reads so."""
        owners = sorted(rows)
        counts = {len(rows[n]) for n in owners}
        if self._table is not None and len(counts) == 1:
            yield self._at_once([rows[n] for n in owners], owners)
            return
        owned = [(n, self._windows[row]) for n in owners for row in rows[n]]
        whole = self._joint(owned)
        if whole.batch.segments is not None and not self.supports_packing:
            yield from (self._joint([one]) for one in owned)
        else:
            yield whole

    def _joint(self, owned: Sequence[tuple[int, Window]]) -> MultiAdapterBatch:
        batch = collate([window for _, window in owned])
        lengths = batch.segments or [batch.ids.shape[1]] * len(owned)
        read, labels = [0] * self._adapters, [0] * self._adapters
        for (number, window), length in zip(owned, lengths, strict=True):
            read[number] += length
            labels[number] += len(window.labels) - window.labels.count(IGNORED)
        return MultiAdapterBatch(batch.to(self._model.device), tuple(read), tuple(labels))

    def _at_once(self, rows: Sequence[Sequence[int]], owners: Sequence[int]) -> MultiAdapterBatch:
        """The same where all windows are equally long and learned from whole: a row an adapter, if that is quicker."""
        assert self._table is not None
        found = self._table[:, torch.tensor(rows)]  # (3, L, b, T)
        _, L, b, T = found.shape
        joins = b * T <= self._model.pack_up_to
        ids, positions, labels = found.view(3, L, -1) if joins else found.view(3, -1, T)
        counts = [0] * self._adapters
        for number in owners:
            counts[number] = b * T
        batch = Batch(ids, positions, labels.flatten(), None, (T,) * b if joins else None)
        return MultiAdapterBatch(batch.to(self._model.device), tuple(counts), tuple(counts))


def _table(windows: Dataset) -> Tensor | None:
    """Ids, positions and labels (3, n, T) of windows in memory; None where lengths differ or a label is left out."""
    found = windows.windows if isinstance(windows, InMemoryDataset) else []
    if len({len(w.ids) for w in found}) != 1 or any(IGNORED in w.labels for w in found):
        return None
    places = [list(range(w.start, w.start + len(w.ids))) for w in found]
    return torch.tensor([[list(w.ids) for w in found], places, [list(w.labels) for w in found]])


def losses_of(model: CausalLM, share: AdapterRouting, joint: MultiAdapterBatch) -> Tensor:
    """(L,): the mean cross-entropy of each adapter that has labels, in nats a token."""
    batch = joint.batch
    with share.route(joint.read):
        rows = model.hidden_states(batch.ids, batch.positions, batch.segments).flatten(0, 1)  # (N, D)
    rows = rows if batch.at is None else rows.index_select(0, batch.at)
    counts = [count for count in joint.labels if count]
    if len(set(counts)) == 1 and len(rows) * model.shape.rows <= LOGITS:
        with share.route(joint.labels):
            logits = model.logits(rows).float()
        return F.cross_entropy(logits, batch.labels, reduction="none").view(len(counts), -1).mean(1)
    trained = [p for p in model.head.parameters() if p.requires_grad]
    live = [number for number, count in enumerate(joint.labels) if count]
    parts = zip(live, torch.split(rows, counts), torch.split(batch.labels, counts), strict=True)
    return torch.stack([mean_of(cross_entropy(_head(model, share, n)), x, y, CHUNK, trained) for n, x, y in parts])


def divergences_of(model: CausalLM, share: AdapterRouting, joint: MultiAdapterBatch) -> Tensor:
    """(L,): the mean of KL(base‖adapter) over the tokens of each adapter, in nats."""
    batch = joint.batch
    with torch.no_grad(), share.base():
        before = model.hidden_states(batch.ids, batch.positions, batch.segments).flatten(0, 1)
    with share.route(joint.read):
        after = model.hidden_states(batch.ids, batch.positions, batch.segments).flatten(0, 1)
    trained = [p for p in model.head.parameters() if p.requires_grad]
    live = [number for number, count in enumerate(joint.read) if count]
    counts = [joint.read[number] for number in live]

    def reference(rows: Tensor) -> Tensor:
        with share.base():
            return model.logits(rows)

    parts = zip(live, torch.split(after, counts), torch.split(before, counts), strict=True)
    found = [mean_of(divergence(_head(model, share, n), reference), x, y, CHUNK, trained) for n, x, y in parts]
    return torch.stack(found)


def _head(model: CausalLM, share: AdapterRouting, number: int) -> Head:
    """Logits of rows that are all one adapter's."""

    def head(rows: Tensor) -> Tensor:
        with share.route(share.counts_for(number, len(rows))):
            return model.logits(rows)

    return head


Losses = Callable[[CausalLM, AdapterRouting, MultiAdapterBatch], Tensor]
