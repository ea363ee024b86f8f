"""The loss of a batch, and the gradient of all batches of a step."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.models.base import CausalLM
from pipeline.training.batches import Batch
from pipeline.training.distributed.collectives import all_reduce_numbers
from pipeline.training.losses import CHUNK, chunked_mean, cross_entropy
from pipeline.training.optimizer import FlatAdam

if TYPE_CHECKING:  # with generation, which few runs need
    from pipeline.training.retention import RetentionLoss


def loss_of(model: CausalLM, batch: Batch, chunk: int = CHUNK) -> Tensor:
    """Mean cross-entropy over the labels, in nats per token.

    Logits are computed only for tokens with a label, `chunk` of them at a time.
    """
    rows = model.hidden_states(batch.ids, batch.positions, batch.segments).flatten(0, 1)  # (N, D)
    rows = rows if batch.label_index is None else rows.index_select(0, batch.label_index)
    head = [p for p in model.head.parameters() if p.requires_grad]
    return chunked_mean(cross_entropy(model.logits), rows, batch.labels, chunk, head)


def to_model_device(model: CausalLM, batches: Iterable[Batch]) -> Iterator[Batch]:
    """`batches` on the model's device; unpacked if it does not support packing."""
    for batch in batches:
        for piece in [batch] if model.supports_packing else batch.unpack():
            yield piece.to(model.device)


@dataclass(frozen=True)
class Gradient:
    """Losses in nats per token, the gradient norm and the number of labels. The gradient itself is in the optimizer."""

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
    """Backward through all `batches` of step `number`; every label has the same weight, whatever its batch.

    In a distributed run `batches` are those of this rank, the result is over all ranks. After an fp16 overflow the step
    is repeated at half the loss scale.
    """
    while True:
        result = _accumulate_gradient(model, batches, optimizer, retain, number)
        if math.isfinite(result.norm) or not optimizer.skip():
            return result


def _accumulate_gradient(
    model: CausalLM, batches: list[Batch], optimizer: FlatAdam, retain: "RetentionLoss | None", number: int
) -> Gradient:
    (labels,) = all_reduce_numbers(sum(batch.tokens for batch in batches))
    losses = []
    for batch in to_model_device(model, batches):
        batch_loss = loss_of(model, batch) * (batch.tokens / labels)
        torch.autograd.backward(batch_loss * optimizer.scale)
        losses.append(batch_loss.detach())
    divergences = [] if retain is None else list(_retention_backward(model, retain, optimizer, number))
    # before the gradient is reduced: if a rank is gone, this call raises
    loss, divergence = all_reduce_numbers(_total(losses), _total(divergences))
    norm = optimizer.collect_gradients().item()
    return Gradient(loss, norm, int(labels), None if retain is None else divergence)


def _retention_backward(model: CausalLM, retain: "RetentionLoss", optimizer: FlatAdam, number: int) -> Iterator[Tensor]:
    batches = retain.batches(number)
    (tokens,) = all_reduce_numbers(sum(batch.input_tokens for batch in batches))
    for batch in to_model_device(model, batches):
        divergence = retain.divergence(batch) * (batch.input_tokens / tokens)
        torch.autograd.backward(divergence * (retain.weight * optimizer.scale))
        yield divergence.detach()


def _total(losses: list[Tensor]) -> float:
    return float(sum(loss.item() for loss in losses))
