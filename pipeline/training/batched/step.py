"""One step of many adapters: each learns from its own batches, all in one forward and one backward."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pipeline.adapters.batched import AdapterRouting
from pipeline.models.base import CausalLM
from pipeline.project.params.sections import FinetuneLora
from pipeline.training.batched.batch import Losses, Reader, divergences_of, losses_of
from pipeline.training.batched.evaluation import BatchedEvaluation
from pipeline.training.batches import Batches
from pipeline.training.optimizer import BatchedAdam


@dataclass(frozen=True)
class Variant:
    """One of the adapters: its name, its settings, its order of the data, and of the texts that it is to retain."""

    name: str
    settings: FinetuneLora
    batches: Batches
    retained: Batches | None = None


@dataclass(frozen=True)
class BatchedTrainingTask:
    """Adapters that train together on one frozen base: all learn from the same windows, each in an order of its own."""

    model: CausalLM
    share: AdapterRouting
    variants: tuple[Variant, ...]
    evaluation: BatchedEvaluation | None = None

    @property
    def total(self) -> int:
        """Steps, if nothing ends them before."""
        first = self.variants[0]
        return first.settings.epochs * len(first.batches)

    @cached_property
    def learned(self) -> Reader:
        return Reader(self.model, self.share, self.variants[0].batches.source)

    @cached_property
    def retained(self) -> Reader:
        """Of the texts that any of them retains."""
        found = next(variant.retained for variant in self.variants if variant.retained is not None)
        return Reader(self.model, self.share, found.source)


@dataclass(frozen=True)
class Gradients:
    """By adapter's number: loss and divergence in nats a token, norm of the gradient, labels that were learned from."""

    losses: Mapping[int, float]
    norms: Mapping[int, float]
    labels: Mapping[int, int]
    divergences: Mapping[int, float]

    def spoiled(self) -> list[int]:
        """The adapters of which something is not finite."""
        return [n for n in self.losses if not (math.isfinite(self.losses[n]) and math.isfinite(self.norms[n]))]


def gradients(task: BatchedTrainingTask, optimizer: BatchedAdam, live: Sequence[int], number: int) -> Gradients:
    """Backward through step `number` of the adapters `live`; the optimizer has gathered what came of it."""
    taught = {n: task.variants[n].batches.rows(number) for n in live}
    losses, labels = _backward(task, task.learned, losses_of, taught, dict.fromkeys(live, 1.0))
    kept = {n: retained.rows(number) for n in live if (retained := task.variants[n].retained) is not None}
    divergences: dict[int, float] = {}
    if kept:
        weights = {n: task.variants[n].settings.retain_weight for n in kept}
        divergences, _ = _backward(task, task.retained, divergences_of, kept, weights)
    norms = optimizer.collect_gradients().tolist()
    return Gradients(losses, {n: norms[n] for n in live}, labels, divergences)


def _backward(
    task: BatchedTrainingTask,
    reader: Reader,
    of: Losses,
    rows: Mapping[int, Sequence[Sequence[int]]],
    weights: Mapping[int, float],
) -> tuple[dict[int, float], dict[int, int]]:
    """Each adapter's mean of `of` over its labels in the step, and how many they are."""
    turns = [
        joint
        for turn in range(max(map(len, rows.values()), default=0))
        for joint in reader.joints({n: own[turn] for n, own in rows.items() if turn < len(own)})
    ]
    totals = {n: sum(joint.labels[n] for joint in turns) for n in rows}
    sums = dict.fromkeys(rows, 0.0)
    for joint in turns:
        here = [n for n, labels in enumerate(joint.labels) if labels]
        found = of(task.model, task.share, joint)
        shares = [joint.labels[n] / totals[n] for n in here]
        with task.share.route(joint.read):  # of blocks that run again in backward
            torch.autograd.backward(_dot(found, [part * weights[n] for n, part in zip(here, shares, strict=True)]))
        for n, loss, part in zip(here, found.tolist(), shares, strict=True):
            sums[n] += loss * part
    return sums, totals


def _dot(losses: Tensor, weights: Sequence[float]) -> Tensor:
    """Σ wₙ·lₙ."""
    if set(weights) == {1.0}:
        return losses.sum()
    return losses.dot(torch.tensor(weights, device=losses.device))
