"""Evaluation loss during training, and early stopping."""

from collections.abc import Iterator

import torch
from torch import Tensor

from pipeline.data.windows import Dataset
from pipeline.models.base import CausalLM
from pipeline.training.batches import Batch, batch_for_rank
from pipeline.training.distributed.collectives import all_reduce_numbers
from pipeline.training.optimizer import FlatAdam
from pipeline.training.step import loss_of, to_model_device


class Evaluation:
    """Evaluates every `every` steps and after the last. With `patience` above 0, training returns the best weights.

    Its state is part of the checkpoint, so that a resumed run stops at the same step as an uninterrupted one.
    """

    def __init__(self, windows: Dataset, batch_size: int, every: int, patience: int) -> None:
        self._windows, self._size, self._every, self._patience = windows, batch_size, every, patience
        self._best, self._waited = float("inf"), 0
        self._weights: Tensor | None = None

    def due(self, step: int, last: int) -> bool:
        return step % self._every == 0 or step == last

    def after_step(self, model: CausalLM, optimizer: FlatAdam) -> float:
        """The evaluation loss in nats per token; remembers the weights if it is the lowest so far."""
        loss = self._loss(model)
        if loss < self._best:
            self._best, self._waited = loss, 0
            self._weights = optimizer.weights.detach().clone() if self._patience else None
        else:
            self._waited += 1
        return loss

    @property
    def should_stop(self) -> bool:
        """Whether the last `patience` evaluations were no better than the best one."""
        return bool(self._patience) and self._waited >= self._patience

    def restore_best(self, optimizer: FlatAdam) -> None:
        if self._weights is not None:
            optimizer.set_weights(self._weights)

    @torch.no_grad()
    def _loss(self, model: CausalLM) -> float:
        total, tokens = 0.0, 0
        for batch in self._batches(model):
            total += float(loss_of(model, batch)) * batch.tokens
            tokens += batch.tokens
        total, labels = all_reduce_numbers(total, tokens)
        return total / labels

    def _batches(self, model: CausalLM) -> Iterator[Batch]:
        for start in range(0, len(self._windows), self._size):
            numbers = range(start, min(start + self._size, len(self._windows)))
            yield from to_model_device(model, [batch_for_rank(self._windows, numbers)])

    def state(self) -> dict[str, Tensor]:
        best = {} if self._weights is None else {"best_weights": self._weights}
        return {"evaluation": torch.tensor([self._best, float(self._waited)], dtype=torch.float64), **best}

    def restore(self, state: dict[str, Tensor]) -> None:
        best, waited = state["evaluation"].tolist()
        self._best, self._waited = best, int(waited)
        self._weights = state.get("best_weights")
