"""Losses and gradients of one step, and evaluation: the same for one learner and for many."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pipeline.models.base import CausalLM
from pipeline.models.device import read_numbers, to_device
from pipeline.models.kernels import uses_cpu_kernels
from pipeline.project.params.sections import Training
from pipeline.training.batches import Batch, Batches
from pipeline.training.losses import mean_cross_entropy
from pipeline.training.optimizer import FlatOptimizer
from pipeline.training.parallel.collectives import all_reduce_numbers, is_distributed

if TYPE_CHECKING:  # what few runs need
    from pipeline.project.logs.run_log import Sample
    from pipeline.training.noise import LearnerNoise
    from pipeline.training.retention import RetentionLoss


@dataclass
class Learner:
    """What trains one row of the optimizer's weights, and how far it is.

    A run has one, a sweep one per adapter.
    """

    settings: Training
    batches: Batches
    retain: "RetentionLoss | None" = None
    name: str = ""  # the subfolder of its log in the run folder; empty for the only one
    noise: "LearnerNoise | None" = None  # dropout and NEFTune
    tokens: int = 0  # labels seen
    # steps it had taken when it was stopped early; None: it was not
    stopped: int | None = None
    diverged: bool = False  # whether it was stopped for a loss or gradient that is not finite
    message: str = ""  # why it was stopped, until the user has been told
    answers: "Sequence[Sample]" = ()  # to held-out examples, if the last step was evaluated

    def stop(self, step: int, message: str, diverged: bool = False) -> None:
        self.stopped, self.message, self.diverged = step, message, diverged

    def resume(self) -> None:
        """As before it was stopped."""
        self.stopped, self.message, self.diverged = None, "", False


@dataclass(frozen=True)
class StepBatch:
    """A batch with learner 0's sequences first, then learner 1's, …"""

    batch: Batch
    labels: Mapping[int, int]  # learner → number of its labels
    input_tokens: tuple[int, ...] = ()  # by learner; 0 for one without a sequence in the batch
    # learner → what its loss is the mean of, such as pairs of answers; if empty, labels
    units: Mapping[int, int] = field(default_factory=dict)

    @property
    def weights(self) -> Mapping[int, int]:
        """Learner → how much the batch's loss counts among those of a step."""
        return self.units or self.labels

    def lengths(self) -> list[list[int]]:
        """The lengths of each learner's sequences, in the order of the batch."""
        rows, length = self.batch.ids.shape
        lengths = iter((self.batch.segments or (length,)) * rows)
        by_learner: list[list[int]] = []
        for tokens in self.input_tokens or [rows * length]:
            sequences: list[int] = []
            while sum(sequences) < tokens:
                sequences.append(next(lengths))
            by_learner.append(sequences)
        return by_learner


class LossPath:
    """How the learners of a model read batches: here a single one, that is the model itself.

    Many adapters (`batched.py`) and pairs of answers (`preferences/losses.py`) override it.
    """

    rewards = False  # whether `measured` gives the rewards of answers

    def __init__(self, model: CausalLM) -> None:
        self._model = model

    @property
    def supports_packing(self) -> bool:
        return self._model.supports_packing

    def batches(self, orders: Mapping[int, Batches], number: int) -> Iterator[StepBatch]:
        """The batches of step `number`, for this rank.

        `orders`: learner → its batches of the same windows.
        """
        (order,) = orders.values()
        for batch in to_model_device(self._model, order[number]):
            yield StepBatch(batch, {0: batch.tokens})

    def base(self) -> AbstractContextManager[None]:
        """A context in which the model can be tried on input that belongs to no learner."""
        return nullcontext()

    def route(self, batch: StepBatch) -> AbstractContextManager[None]:  # noqa: ARG002
        """Losses of the batch, and their backward pass, must be computed inside this context."""
        return nullcontext()

    def losses(self, batch: StepBatch) -> Tensor:
        """The mean loss of each learner in `batch.labels`, (L,); of a single learner a scalar."""
        return loss_of(self._model, batch.batch)

    def divergences(self, batch: StepBatch, retain: "RetentionLoss") -> Tensor:
        """As `losses`, of the mean KL(base‖model)."""
        return retain.divergence(batch.batch)

    def measured(self) -> Mapping[str, float]:
        """Mean rewards over the batches read since the last call, by name; {} without rewards."""
        return {}


def loss_of(model: CausalLM, batch: Batch, chunk: int | None = None) -> Tensor:
    """Mean cross-entropy over the labels, in nats per token.

    Logits are computed only for tokens with a label, `chunk` of them at a time; None: as many as
    suit the device.
    """
    rows = model.labelled_states(  # (N, D)
        batch.ids, batch.positions, batch.segments, batch.label_index
    )
    return mean_cross_entropy(model, rows, batch.labels, chunk)


def to_model_device(model: CausalLM, batches: Iterable[Batch]) -> Iterator[Batch]:
    """`batches` on the model's device; unpacked if it does not support packing."""
    for batch in batches:
        for piece in [batch] if model.supports_packing else batch.unpack():
            yield piece.to(model.device)


@dataclass(frozen=True)
class Gradient:
    """What is logged of a learner's gradient, which itself is in the optimizer."""

    loss: float  # in nats per token
    norm: float
    tokens: int  # labels
    divergence: float | None = None  # from the base, in nats per token

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.norm)


def gradients(
    path: LossPath,
    learners: Sequence[Learner],
    live: Sequence[int],
    optimizer: FlatOptimizer,
    number: int,
) -> dict[int, Gradient]:
    """Backward through step `number` of the learners `live`, and collect their gradients.

    In a distributed run a rank reads its own batches, and the result is over all ranks. After an
    fp16 overflow the step is repeated at half the loss scale, so that no data is skipped.
    """
    orders = {n: learners[n].batches for n in live}
    noises = {n: noise for n in live if (noise := learners[n].noise) is not None}
    ones = dict.fromkeys(live, 1.0)
    losses, labels = _backward(path, orders, number, path.losses, ones, optimizer.scale, noises)

    # A second backward, which adds to the same gradients. One after the other: the activations of
    # only one of the two losses are in memory.
    retains = {n: retain for n in live if (retain := learners[n].retain) is not None}
    retained = {n: retain.batches for n, retain in retains.items()}
    divergences = list[BatchLosses]()
    if retains:
        weights = {n: retain.weight for n, retain in retains.items()}
        first = next(iter(retains.values()))  # they differ only in weight and order
        divergence = partial(path.divergences, retain=first)
        divergences, _ = _backward(path, retained, number, divergence, weights, optimizer.scale, {})

    def means(read: Iterator[float]) -> tuple[dict[int, float], dict[int, float]]:
        of_losses, of_divergences = _sums(orders, losses, read), _sums(retained, divergences, read)
        reduced = iter(all_reduce_numbers(*of_losses.values(), *of_divergences.values()))
        return (
            dict(zip(of_losses, reduced, strict=False)),
            dict(zip(of_divergences, reduced, strict=True)),
        )

    queued = [part.values for part in (*losses, *divergences)]
    # Nothing was read so far: on an accelerator all of the step is queued, and the host is free
    # until it is computed.
    if is_distributed():
        # before the gradient is reduced: these go over gloo, which raises at once if a rank is gone
        mean_losses, mean_divergences = means(iter(read_numbers(queued)))
        norms = read_numbers([optimizer.collect_gradients()])
    else:
        collected = optimizer.collect_gradients()
        if not uses_cpu_kernels(collected.device):
            for order in (*orders.values(), *retained.values()):
                order.read_ahead()
        numbers = iter(read_numbers([*queued, collected]))
        mean_losses, mean_divergences = means(numbers)
        norms = [*numbers]
    if not all(math.isfinite(norms[n]) for n in live) and optimizer.skip():
        return gradients(path, learners, live, optimizer, number)
    return {
        n: Gradient(mean_losses[n], norms[n], int(labels[n]), mean_divergences.get(n)) for n in live
    }


class BatchLosses(NamedTuple):
    """A batch's losses, one of each learner, times the batch's share of that learner's step."""

    learners: Sequence[int]
    values: Tensor


def _sums(
    orders: Mapping[int, Batches], parts: Sequence[BatchLosses], read: Iterator[float]
) -> dict[int, float]:
    """Learner → mean loss over this rank's share of the step; `read` are the numbers in `parts`."""
    sums = dict.fromkeys(orders, 0.0)
    for part in parts:
        for n in part.learners:
            sums[n] += next(read)
    return sums


def _backward(
    path: LossPath,
    orders: Mapping[int, Batches],
    number: int,
    losses_of: Callable[[StepBatch], Tensor],
    weights: Mapping[int, float],
    scale: float,
    noises: Mapping[int, "LearnerNoise"],
) -> tuple[list[BatchLosses], dict[int, float]]:
    """Backward through each learner's mean loss over a step, times its weight and the loss scale.

    Every label, or unit where batches have units, has the same weight, whatever its batch.
    `noises` are in force meanwhile. Returns the losses of this rank's batches, and the numbers of
    labels on all ranks.
    """
    batches = list(path.batches(orders, number))
    totals = _totals(orders, [batch.weights for batch in batches])
    labels = totals
    if any(batch.units for batch in batches):
        labels = _totals(orders, [batch.labels for batch in batches])
    parts = list[BatchLosses]()
    for n, noise in noises.items():
        noise.begin(orders[n].first + number)
    for batch in batches:
        with path.route(batch), _during(batch, noises) if noises else nullcontext():
            # gradient accumulation: a batch's mean times its share of the step's labels or units,
            # so that the parts add up to the mean over all of them; the gradients of batches and
            # ranks are then sums
            shares = [weight / totals[n] for n, weight in batch.weights.items()]
            losses = _times(losses_of(batch), shares)  # (L,); logged so, without `weights`
            total = _times(losses, [weights[n] for n in batch.labels])
            total = total if len(shares) == 1 else total.sum()
            torch.autograd.backward(total if scale == 1 else total * scale)
        parts.append(BatchLosses([*batch.labels], losses.detach().view(-1)))
    return parts, labels


def _totals(orders: Mapping[int, Batches], counts: Sequence[Mapping[int, int]]) -> dict[int, float]:
    """Learner → the sum of its counts in all batches, on all ranks."""
    sums = (sum(count.get(n, 0) for count in counts) for n in orders)
    return dict(zip(orders, all_reduce_numbers(*sums), strict=True))


@contextmanager
def _during(batch: StepBatch, noises: Mapping[int, "LearnerNoise"]) -> Iterator[None]:
    """Inside the block the noise of each learner with sequences in the batch is in force."""
    with ExitStack() as stack:
        for n, lengths in enumerate(batch.lengths()):
            if n in noises and lengths:
                stack.enter_context(noises[n].during(lengths))
        yield


def _times(values: Tensor, factors: Sequence[float]) -> Tensor:
    """Each value times its factor. Equal factors, as they mostly are, need no tensor."""
    if len(set(factors)) > 1:
        return values * to_device(torch.tensor(factors, dtype=values.dtype), values.device)
    return values if factors[0] == 1 else values * factors[0]


@torch.no_grad()
def mean_losses(
    path: LossPath, batches: Batches, live: Sequence[int], losses_of: Callable[[StepBatch], Tensor]
) -> dict[int, float]:
    """Learner → the mean of `losses_of` over all batches, in nats per token."""
    weights = list[tuple[int, int]]()  # of each loss the learner and how much it counts
    queued = list[Tensor]()
    for number in range(len(batches)):
        for batch in path.batches(dict.fromkeys(live, batches), number):
            with path.route(batch):
                queued.append(losses_of(batch).view(-1))
            weights += batch.weights.items()
    sums, counts = dict.fromkeys(live, 0.0), dict.fromkeys(live, 0)
    for (n, count), loss in zip(weights, read_numbers(queued), strict=True):
        sums[n] += loss * count  # an idle batch counts 0
        counts[n] += count
    reduced = all_reduce_numbers(*sums.values(), *counts.values())
    parts = zip(live, reduced, reduced[len(live) :], strict=False)
    return {n: total / count for n, total, count in parts}


NO_BETTER = "no longer improves"


class Evaluation:
    """Evaluates every so many steps; with `patience` or `load_best`, training returns the best
    weights.

    It evaluates after the last step too, and after those whose models are kept. The best weights
    are those of the lowest loss; where answers are given, those of the most answers as expected,
    and among these of the lowest loss.

    `rungs`: step → how many learners train on after it, those with the lowest losses; each rung is
    evaluated too. The state of the evaluation is part of the checkpoint, so that a resumed run
    stops at the same step as an uninterrupted one.
    """

    def __init__(
        self,
        batches: Batches,
        every: int,
        patience: int,
        learners: int = 1,
        rungs: Mapping[int, int] | None = None,
        save_steps: int = 0,
        load_best: bool = False,
    ) -> None:
        self._batches, self._patience = batches, patience
        self._every = [steps for steps in (every, save_steps) if steps]
        self._takes_best = load_best or patience > 0
        self._rungs = rungs or {}
        # learner → how many trained on at the rung that stopped it; 0 while it trains on
        self._left = torch.zeros(learners, dtype=torch.int64)
        self._best = [(math.inf, math.inf)] * learners  # share of wrong answers, loss
        self._best_steps = [0] * learners
        self._waited = torch.zeros(learners, dtype=torch.int64)  # evaluations since the best one
        self._weights: Tensor | None = None  # (N, P)

    @classmethod
    def of(cls, settings: Training, batches: Batches, per_epoch: int) -> "Evaluation":
        """The evaluation of a single learner, whose epochs have `per_epoch` steps."""
        return cls(
            batches,
            settings.eval_steps or per_epoch,
            settings.patience,
            save_steps=settings.save_steps,
            load_best=settings.load_best,
        )

    def due(self, step: int, last: int) -> bool:
        is_multiple = any(step % every == 0 for every in self._every)
        return is_multiple or step == last or step in self._rungs

    def after_step(
        self,
        path: LossPath,
        optimizer: FlatOptimizer,
        live: Sequence[int],
        step: int,
        answers: Mapping[int, float] | None = None,
    ) -> dict[int, float]:
        """Learner → evaluation loss in nats per token; remembers the best weights so far.

        `answers`: learner → its share of answers as expected, where the best weights are chosen by
        it.
        """
        means = mean_losses(path, self._batches, live, path.losses)
        for n, mean in means.items():
            reached = (1 - answers[n] if answers else 0.0, mean)
            if math.isnan(mean) or reached >= self._best[n]:
                self._waited[n] += 1
                continue
            self._best[n], self._best_steps[n], self._waited[n] = reached, step, 0
            if self._takes_best:
                if self._weights is None:  # in the host's memory: a card has none to spare
                    self._weights = optimizer.weights.to("cpu", copy=True)
                self._weights[n] = optimizer.weights[n]
        if left := self._rungs.get(step):
            for n in sorted(means, key=lambda n: (math.isnan(means[n]), means[n]))[left:]:
                self._left[n] = left
        return means

    def dropped(self, learner: int) -> bool:
        """Whether it was stopped at a rung."""
        return bool(self._left[learner])

    def why_stop(self, learner: int) -> str:
        """What of its evaluation ends a learner's training; empty if it trains on."""
        if left := int(self._left[learner]):
            return "is not the lowest" if left == 1 else f"is not among the {left} lowest"
        # the last `patience` evaluations were no better than its best one
        return NO_BETTER if self._patience and int(self._waited[learner]) >= self._patience else ""

    @property
    def best_step(self) -> int:
        """The step of the first learner's best weights."""
        return self._best_steps[0]

    def restore_best(self, optimizer: FlatOptimizer) -> None:
        if self._weights is not None:
            optimizer.set_weights(self._weights)

    def state(self) -> dict[str, Tensor]:
        best = {} if self._weights is None else {"best_weights": self._weights}
        rungs = {"left": self._left} if self._rungs else {}
        reached = torch.tensor(self._best, dtype=torch.float64)  # (N, 2)
        steps = torch.tensor(self._best_steps)
        return {"best_loss": reached, "best_step": steps, "waited": self._waited, **rungs, **best}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self._best = [(wrong, loss) for wrong, loss in state["best_loss"].tolist()]
        self._best_steps = state["best_step"].tolist()
        self._waited = state["waited"].clone()
        self._weights = state.get("best_weights")
        if self._rungs:
            self._left = state["left"].clone()
