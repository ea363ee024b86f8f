"""The training loop of many adapters at once. Each gets the result of training alone."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.project.logs.run_log import Step
from pipeline.training.batched.step import BatchedTrainingTask, Gradients, Variant, gradients
from pipeline.training.optimizer import BatchedAdam
from pipeline.training.schedule import rate


@dataclass
class AdapterProgress:
    """Per adapter: labelled tokens seen, the last step before it was stopped (0: running, -1: stopped before step 1).

    `diverged`: 1 if it was stopped because its next loss or gradient was not finite.
    """

    tokens: list[int]
    stopped: list[int]
    diverged: list[int]
    messages: list[str] = field(default_factory=list)  # notes not yet shown to the user

    @classmethod
    def of(cls, adapters: int) -> "AdapterProgress":
        return cls([0] * adapters, [0] * adapters, [0] * adapters)

    @property
    def live(self) -> list[int]:
        return [n for n, stopped in enumerate(self.stopped) if not stopped]

    @property
    def ended(self) -> list[int]:
        """The adapters that were stopped."""
        return [n for n, stopped in enumerate(self.stopped) if stopped]

    def last(self, number: int, done: int) -> int:
        """The number of steps an adapter has taken when the run has done `done`."""
        return max(self.stopped[number], 0) if self.stopped[number] else done

    def stop(self, number: int, step: int, message: str, diverged: bool = False) -> None:
        """Stop an adapter after `step`; 0 is stored as -1, because 0 means that it is running."""
        self.stopped[number], self.diverged[number] = step or -1, int(diverged)
        self.messages.append(message)

    def state(self) -> dict[str, Tensor]:
        return {name: torch.tensor(getattr(self, name)) for name in ("tokens", "stopped", "diverged")}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.tokens, self.stopped, self.diverged = (state[n].tolist() for n in ("tokens", "stopped", "diverged"))


def steps(
    task: BatchedTrainingTask, optimizer: BatchedAdam, progress: AdapterProgress, done: int = 0
) -> Iterator[dict[int, Step]]:
    """Train from after step `done`; yields per step adapter index → record, for the adapters that took it.

    An adapter with a non-finite loss or gradient is stopped before the step, one that no longer improves after it. The
    other adapters continue as if it were not in the batch.
    """
    for number in range(done, task.total):
        _stop_early(task, progress, number)
        result = _finite_gradients(task, optimizer, progress, number)
        live = progress.live
        if not live:
            return
        rates = {n: rate(task.variants[n].settings, number + 1, task.total) for n in live}
        _optimizer_step(task, optimizer, result, rates)
        for n in live:
            progress.tokens[n] += result.labels[n]
        eval_losses: dict[int, float] = {}
        if task.evaluation is not None and task.evaluation.due(number + 1, task.total):
            eval_losses = task.evaluation.after_step(task.model, task.routing, optimizer, live)
        epoch = number // len(task.variants[0].batches) + 1
        yield {
            n: Step(
                number + 1,
                epoch,
                result.losses[n],
                rates[n],
                result.norms[n],
                progress.tokens[n],
                eval_losses.get(n),
                result.divergences.get(n),
            )
            for n in live
        }


def _stop_early(task: BatchedTrainingTask, progress: AdapterProgress, done: int) -> None:
    for n in progress.live if task.evaluation is not None else []:
        if task.evaluation is not None and task.evaluation.should_stop(n):
            progress.stop(
                n, done, f"{task.variants[n].name} stopped after step {done}: its evaluation loss no longer improves"
            )


def _finite_gradients(
    task: BatchedTrainingTask, optimizer: BatchedAdam, progress: AdapterProgress, number: int
) -> Gradients:
    """The gradients of step `number`, once the adapters that make them non-finite are stopped."""

    def compute(live: list[int]) -> Gradients:
        return gradients(task, optimizer, live, number)

    result = compute(progress.live)
    while result.non_finite():  # NaN can spread to other adapters in the batch: running each alone shows whose it is
        alone = {n: compute([n]) for n in result.non_finite()}
        diverged = {n: single for n, single in alone.items() if single.non_finite()} or alone
        for n, single in diverged.items():
            message = _describe_divergence(task.variants[n], number, single.losses[n], single.norms[n])
            progress.stop(n, number, message, diverged=True)
        result = compute(progress.live)
    return result


def _describe_divergence(variant: Variant, number: int, loss: float, norm: float) -> str:
    locations = variant.batches.locations(number)
    shown = ", ".join(locations[:4]) + (f" and {len(locations) - 4} more" if len(locations) > 4 else "")
    return (
        f"{variant.name} is stopped: at step {number + 1}, on {shown}, its loss is {loss:.4g} and its gradient norm "
        f"{norm:.4g}. Lower its learning_rate."
    )


def _optimizer_step(
    task: BatchedTrainingTask, optimizer: BatchedAdam, result: Gradients, rates: Mapping[int, float]
) -> None:
    """One optimizer step: each adapter at its rate, with its gradient clipped. Stopped adapters do not change."""
    clipped = {n: _clip_factor(task.variants[n].settings.max_grad_norm, result.norms[n]) for n in rates}
    if len(rates) < len(task.variants) or set(clipped.values()) != {1.0}:
        optimizer.scale([clipped.get(n, 0.0) for n in range(len(task.variants))])
    optimizer.step([rates.get(n, 0.0) for n in range(len(task.variants))])


def _clip_factor(largest: float, norm: float) -> float:
    return largest / norm if largest and norm > largest else 1.0
