"""The loop of many adapters that train together: each is what it is when it trains alone."""

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
    """How far each of N adapters is: labels it has learned from, and the step after which it was stopped (0: none).

    `diverged`: whether that was because its loss or gradient at the next step was not finite.
    """

    tokens: list[int]
    stopped: list[int]
    diverged: list[int]
    news: list[str] = field(default_factory=list)  # what there is to say of them

    @classmethod
    def of(cls, adapters: int) -> "AdapterProgress":
        return cls([0] * adapters, [0] * adapters, [0] * adapters)

    @property
    def live(self) -> list[int]:
        return [n for n, stopped in enumerate(self.stopped) if not stopped]

    @property
    def ended(self) -> list[int]:
        """Those that were stopped."""
        return [n for n, stopped in enumerate(self.stopped) if stopped]

    def last(self, number: int, done: int) -> int:
        """The last step that an adapter took, of `done`."""
        return max(self.stopped[number], 0) if self.stopped[number] else done

    def stop(self, number: int, step: int, news: str, diverged: bool = False) -> None:
        """A step of 0 is written as -1: the adapter never took one."""
        self.stopped[number], self.diverged[number] = step or -1, int(diverged)
        self.news.append(news)

    def state(self) -> dict[str, Tensor]:
        return {name: torch.tensor(getattr(self, name)) for name in ("tokens", "stopped", "diverged")}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.tokens, self.stopped, self.diverged = (state[n].tolist() for n in ("tokens", "stopped", "diverged"))


def steps(
    task: BatchedTrainingTask, optimizer: BatchedAdam, standing: AdapterProgress, done: int = 0
) -> Iterator[dict[int, Step]]:
    """Train from after step `done`: a record for each adapter that took the step, by its number.

    An adapter whose loss or gradient is not finite is stopped before that step, one without hope after it; the others
    go on as if it had never been.
    """
    for number in range(done, task.total):
        _stop_hopeless(task, standing, number)
        found = _finite_gradients(task, optimizer, standing, number)
        live = standing.live
        if not live:
            return
        rates = {n: rate(task.variants[n].settings, number + 1, task.total) for n in live}
        _update(task, optimizer, found, rates)
        for n in live:
            standing.tokens[n] += found.labels[n]
        held_out: dict[int, float] = {}
        if task.evaluation is not None and task.evaluation.due(number + 1, task.total):
            held_out = task.evaluation.after_step(task.model, task.share, optimizer, live)
        epoch = number // len(task.variants[0].batches) + 1
        yield {
            n: Step(
                number + 1,
                epoch,
                found.losses[n],
                rates[n],
                found.norms[n],
                standing.tokens[n],
                held_out.get(n),
                found.divergences.get(n),
            )
            for n in live
        }


def _stop_hopeless(task: BatchedTrainingTask, standing: AdapterProgress, done: int) -> None:
    for n in standing.live if task.evaluation is not None else []:
        if task.evaluation is not None and task.evaluation.should_stop(n):
            standing.stop(
                n, done, f"{task.variants[n].name} stopped after step {done}: no better loss on what is held out"
            )


def _finite_gradients(
    task: BatchedTrainingTask, optimizer: BatchedAdam, standing: AdapterProgress, number: int
) -> Gradients:
    """Those of step `number`, once the adapters that spoil them are stopped."""

    def of(live: list[int]) -> Gradients:
        return gradients(task, optimizer, live, number)

    found = of(standing.live)
    while found.spoiled():  # in one forward what is not finite may spread: each alone shows whose it is
        alone = {n: of([n]) for n in found.spoiled()}
        guilty = {n: one for n, one in alone.items() if one.spoiled()} or alone
        for n, one in guilty.items():
            standing.stop(n, number, _divergence(task.variants[n], number, one.losses[n], one.norms[n]), diverged=True)
        found = of(standing.live)
    return found


def _divergence(variant: Variant, number: int, loss: float, norm: float) -> str:
    places = variant.batches.places(number)
    shown = ", ".join(places[:4]) + (f" and {len(places) - 4} more" if len(places) > 4 else "")
    return (
        f"{variant.name} is stopped: at step {number + 1}, on {shown}, its loss is {loss:.4g} and its gradient's norm "
        f"{norm:.4g}. Lower its learning_rate"
    )


def _update(task: BatchedTrainingTask, optimizer: BatchedAdam, found: Gradients, rates: Mapping[int, float]) -> None:
    """One step of each adapter at its rate, its gradient clipped; one that is stopped stays as it is."""
    clipped = {n: _factor(task.variants[n].settings.clip_norm, found.norms[n]) for n in rates}
    if len(rates) < len(task.variants) or set(clipped.values()) != {1.0}:
        optimizer.scale([clipped.get(n, 0.0) for n in range(len(task.variants))])
    optimizer.step([rates.get(n, 0.0) for n in range(len(task.variants))])


def _factor(largest: float, norm: float) -> float:
    return largest / norm if largest and norm > largest else 1.0
