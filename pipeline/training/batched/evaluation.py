"""Evaluation loss of many adapters in one pass, and early stopping of each."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.adapters.batched import AdapterRouting
from pipeline.data.windows import Dataset
from pipeline.models.base import CausalLM
from pipeline.training.batched.batch import Reader, adapter_losses
from pipeline.training.optimizer import BatchedAdam


class BatchedEvaluation:
    """As `Evaluation`, with a best loss and, if `patience` is above 0, the best weights for each of N adapters."""

    def __init__(self, windows: Dataset, batch_size: int, every: int, patience: int, adapters: int) -> None:
        self._windows, self._size, self._every, self._patience = windows, batch_size, every, patience
        self._best = torch.full((adapters,), torch.inf, dtype=torch.float64)
        self._waited = torch.zeros(adapters, dtype=torch.int64)
        self._weights: Tensor | None = None  # (N, P)
        self._reader: Reader | None = None

    def due(self, step: int, last: int) -> bool:
        return step % self._every == 0 or step == last

    def after_step(
        self, model: CausalLM, routing: AdapterRouting, optimizer: BatchedAdam, live: Sequence[int]
    ) -> dict[int, float]:
        """Adapter index → evaluation loss in nats per token, for the adapters `live`."""
        losses = self._losses(model, routing, live)
        better = [n for n in live if losses[n] < self._best[n]]
        self._waited[[n for n in live if n not in better]] += 1
        self._waited[better] = 0
        self._best[better] = torch.tensor([losses[n] for n in better], dtype=torch.float64)
        if self._patience:
            now = optimizer.weights
            # restored weights are on the CPU
            self._weights = now.clone() if self._weights is None else self._weights.to(now.device)
            self._weights[better] = now[better]
        return losses

    def should_stop(self, number: int) -> bool:
        """Whether the last `patience` evaluations of this adapter were no better than its best one."""
        return bool(self._patience) and int(self._waited[number]) >= self._patience

    def restore_best(self, optimizer: BatchedAdam) -> None:
        if self._weights is not None:
            optimizer.set_weights(self._weights)

    @torch.no_grad()
    def _losses(self, model: CausalLM, routing: AdapterRouting, live: Sequence[int]) -> dict[int, float]:
        sums, tokens = dict.fromkeys(live, 0.0), dict.fromkeys(live, 0)
        self._reader = self._reader or Reader(model, routing, self._windows)
        for start in range(0, len(self._windows), self._size):
            rows = range(start, min(start + self._size, len(self._windows)))
            for joint in self._reader.batches(dict.fromkeys(live, rows)):
                present = [n for n in live if joint.labels[n]]
                for n, loss in zip(present, adapter_losses(model, routing, joint).tolist(), strict=True):
                    sums[n] += loss * joint.labels[n]
                    tokens[n] += joint.labels[n]
        return {n: sums[n] / tokens[n] for n in live}

    def state(self) -> dict[str, Tensor]:
        best = {} if self._weights is None else {"best_weights": self._weights}
        return {"best_loss": self._best, "waited": self._waited, **best}

    def restore(self, state: dict[str, Tensor]) -> None:
        self._best, self._waited = state["best_loss"].clone(), state["waited"].clone()
        self._weights = state.get("best_weights")
