"""One step of many adapters: each has its own batches, all run in one forward and one backward pass."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pipeline.adapters.batched import AdapterRouting
from pipeline.models.base import CausalLM
from pipeline.training.batched.batch import LossFunction, Reader, adapter_divergences, adapter_losses
from pipeline.training.batched.evaluation import BatchedEvaluation
from pipeline.training.batches import Batches
from pipeline.training.optimizer import BatchedAdam


@dataclass(frozen=True)
class Variant:
    """One of the adapters: its name, settings, batches of the training data and batches of the retention texts."""

    name: str
    settings: Any
    batches: Batches
    retained: Batches | None = None


@dataclass(frozen=True)
class BatchedTrainingTask:
    """Adapters that train together on one frozen base, on the same windows, each in its own order."""

    model: CausalLM
    routing: AdapterRouting
    variants: tuple[Variant, ...]
    evaluation: BatchedEvaluation | None = None

    @property
    def total(self) -> int:
        """Number of steps without early stopping."""
        first = self.variants[0]
        return int(first.settings.epochs) * len(first.batches)

    @cached_property
    def training_reader(self) -> Reader:
        return Reader(self.model, self.routing, self.variants[0].batches.dataset)

    @cached_property
    def retention_reader(self) -> Reader:
        """Reads the retention texts; at least one variant must have them."""
        batches = next(variant.retained for variant in self.variants if variant.retained is not None)
        return Reader(self.model, self.routing, batches.dataset)


@dataclass(frozen=True)
class Gradients:
    """By adapter index: loss and divergence in nats per token, gradient norm and number of labels."""

    losses: Mapping[int, float]
    norms: Mapping[int, float]
    labels: Mapping[int, int]
    divergences: Mapping[int, float]

    def non_finite(self) -> list[int]:
        """The adapters whose loss or gradient is not finite."""
        return [n for n in self.losses if not (math.isfinite(self.losses[n]) and math.isfinite(self.norms[n]))]


def gradients(task: BatchedTrainingTask, optimizer: BatchedAdam, live: Sequence[int], number: int) -> Gradients:
    """Backward through step `number` of the adapters `live`; the gradients are collected in the optimizer."""
    training_rows = {n: task.variants[n].batches.rows(number) for n in live}
    losses, labels = _backward(task, task.training_reader, adapter_losses, training_rows, dict.fromkeys(live, 1.0))
    retention_rows = {n: retained.rows(number) for n in live if (retained := task.variants[n].retained) is not None}
    divergences: dict[int, float] = {}
    if retention_rows:
        weights = {n: task.variants[n].settings.retention_weight for n in retention_rows}
        divergences, _ = _backward(task, task.retention_reader, adapter_divergences, retention_rows, weights)
    norms = optimizer.collect_gradients().tolist()
    return Gradients(losses, {n: norms[n] for n in live}, labels, divergences)


def _backward(
    task: BatchedTrainingTask,
    reader: Reader,
    loss_function: LossFunction,
    rows: Mapping[int, Sequence[Sequence[int]]],
    weights: Mapping[int, float],
) -> tuple[dict[int, float], dict[int, int]]:
    """Each adapter's mean loss over its labels in the step, and their number. `rows`: adapter → its batches."""
    joints = [
        joint
        for index in range(max(map(len, rows.values()), default=0))
        for joint in reader.batches({n: batches[index] for n, batches in rows.items() if index < len(batches)})
    ]
    totals = {n: sum(joint.labels[n] for joint in joints) for n in rows}
    sums = dict.fromkeys(rows, 0.0)
    for joint in joints:
        present = [n for n, labels in enumerate(joint.labels) if labels]
        losses = loss_function(task.model, task.routing, joint)
        shares = [joint.labels[n] / totals[n] for n in present]
        weighted = _dot(losses, [share * weights[n] for n, share in zip(present, shares, strict=True)])
        with task.routing.route(joint.input_tokens):  # also in backward: checkpointed blocks run again
            torch.autograd.backward(weighted)
        for n, loss, share in zip(present, losses.tolist(), shares, strict=True):
            sums[n] += loss * share
    return sums, totals


def _dot(losses: Tensor, weights: Sequence[float]) -> Tensor:
    """Σ wₙ·lₙ."""
    if set(weights) == {1.0}:
        return losses.sum()
    return losses.dot(torch.tensor(weights, device=losses.device))
