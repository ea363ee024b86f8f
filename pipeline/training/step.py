"""What one step computes: the loss of a batch, and the gradient of all that makes a step."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.models.base import CausalLM
from pipeline.training.batches import Batch
from pipeline.training.distributed.collectives import all_reduce_numbers
from pipeline.training.losses import CHUNK, cross_entropy, mean_of
from pipeline.training.optimizer import FlatAdam

if TYPE_CHECKING:  # with generation, which few runs need
    from pipeline.training.retention import RetentionLoss


def loss_of(model: CausalLM, batch: Batch, chunk: int = CHUNK) -> Tensor:
    """Mean cross-entropy over the labels that count, in nats a token.

    No logits where no label stands, and those of `chunk` labels at a time.
    """
    rows = model.hidden_states(batch.ids, batch.positions, batch.segments).flatten(0, 1)  # (N, D)
    rows = rows if batch.at is None else rows.index_select(0, batch.at)
    head = [p for p in model.head.parameters() if p.requires_grad]
    return mean_of(cross_entropy(model.logits), rows, batch.labels, chunk, head)


def to_model_device(model: CausalLM, batches: Iterable[Batch]) -> Iterator[Batch]:
    """`batches` on the model's device, in the form that it reads."""
    for batch in batches:
        for part in [batch] if model.supports_packing else batch.unpack():
            yield part.to(model.device)


@dataclass(frozen=True)
class Gradient:
    """Losses in nats a token, labels that were learned from, and the norm of the gradient, which the optimizer has."""

    loss: float
    norm: float
    tokens: int
    divergence: float | None = None

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.norm)


def gradient(
    model: CausalLM, batches: list[Batch], optimizer: FlatAdam, retain: "RetentionLoss | None", number: int
) -> Gradient:
    """Backward through all `batches` of step `number`: each label has the same weight, whatever its batch.

    With several processes `batches` are this one's share; what comes out is of all.
    """
    while True:
        found = _gradient(model, batches, optimizer, retain, number)
        if math.isfinite(found.norm) or not optimizer.skip():
            return found


def _gradient(
    model: CausalLM, batches: list[Batch], optimizer: FlatAdam, retain: "RetentionLoss | None", number: int
) -> Gradient:
    (labels,) = all_reduce_numbers(sum(batch.tokens for batch in batches))
    losses = []
    for batch in to_model_device(model, batches):
        loss = loss_of(model, batch) * (batch.tokens / labels)
        torch.autograd.backward(loss * optimizer.scale)
        losses.append(loss.detach())
    kept = [] if retain is None else list(_retained(model, retain, optimizer, number))
    whole, apart = all_reduce_numbers(
        _sum(losses), _sum(kept)
    )  # before the gradient: where a process is gone, this says so
    norm = optimizer.collect_gradients().item()
    return Gradient(whole, norm, int(labels), None if retain is None else apart)


def _retained(model: CausalLM, retain: "RetentionLoss", optimizer: FlatAdam, number: int) -> Iterator[Tensor]:
    batches = retain.batches(number)
    (tokens,) = all_reduce_numbers(sum(batch.read for batch in batches))
    for batch in to_model_device(model, batches):
        divergence = retain.divergence(batch) * (batch.read / tokens)
        torch.autograd.backward(divergence * (retain.weight * optimizer.scale))
        yield divergence.detach()


def _sum(losses: list[Tensor]) -> float:
    return float(sum(loss.item() for loss in losses))
