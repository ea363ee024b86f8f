"""Preference losses on pairs of answers: DPO, IPO, SimPO, ORPO and KTO, as TRL computes them.

The reference of DPO, IPO and KTO is the model itself before training, whose log-probabilities are
computed once (`preferences/data.py`). SimPO and ORPO have no reference.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.base import CausalLM
from pipeline.models.device import read_numbers
from pipeline.project.logs.run_log import REWARDS
from pipeline.training.batches import Batch, Batches
from pipeline.training.losses import chunk_of, log_probs, trained_head
from pipeline.training.parallel.collectives import all_reduce_numbers, is_distributed
from pipeline.training.preferences.batches import AnswerBatch, AnswerBatches
from pipeline.training.step import LossPath, StepBatch

PreferenceLoss = Literal["dpo", "ipo", "kto", "orpo", "simpo"]
WITH_REFERENCE = ("dpo", "ipo", "kto")


class PreferenceSettings(Protocol):
    """The keys of a method's section that a preference loss takes."""

    @property
    def loss(self) -> PreferenceLoss: ...
    @property
    def beta(self) -> float: ...
    @property
    def label_smoothing(self) -> float: ...
    @property
    def rpo_alpha(self) -> float: ...
    @property
    def simpo_gamma(self) -> float: ...


# The losses of n pairs, (n,). `chosen` and `rejected` (n,) are the scores of their answers: the
# log-ratio to the reference, log π(y|x) − log π_ref(y|x), for IPO per token; for SimPO and ORPO,
# the mean log-probability of the answer's tokens.


def dpo(chosen: Tensor, rejected: Tensor, settings: PreferenceSettings) -> Tensor:
    """−log σ(β(chosen − rejected)): Rafailov et al. 2023, eq. 7."""
    return _sigmoid_loss(settings.beta * (chosen - rejected), settings.label_smoothing)


def ipo(chosen: Tensor, rejected: Tensor, settings: PreferenceSettings) -> Tensor:
    """(chosen − rejected − 1/2β)²: Azar et al. 2023, eq. 17."""
    return (chosen - rejected - 1 / (2 * settings.beta)).square()


def simpo(chosen: Tensor, rejected: Tensor, settings: PreferenceSettings) -> Tensor:
    """−log σ(β(chosen − rejected) − γ): Meng et al. 2024, eq. 6."""
    margins = settings.beta * (chosen - rejected) - settings.simpo_gamma
    return _sigmoid_loss(margins, settings.label_smoothing)


def orpo(chosen: Tensor, rejected: Tensor, settings: PreferenceSettings) -> Tensor:
    """−β log σ(log odds ratio): Hong et al. 2024, eq. 6 and 7.

    `preference` adds the negative log-likelihood of prompt and answer.
    """
    log_odds = chosen - rejected - (_log1mexp(chosen) - _log1mexp(rejected))
    return -settings.beta * F.logsigmoid(log_odds)


PAIRED: Mapping[str, Callable[[Tensor, Tensor, PreferenceSettings], Tensor]] = {
    "dpo": dpo,
    "ipo": ipo,
    "simpo": simpo,
    "orpo": orpo,
}


def kto(
    scores: Tensor, desirable: Tensor, divergence: Tensor, settings: PreferenceSettings
) -> Tensor:
    """1 − σ(±β(score − divergence)): Ethayarajh et al. 2024, eq. 8, with both weights 1."""
    sign = desirable.to(scores.dtype) * 2 - 1
    return (1 - torch.sigmoid(sign * settings.beta * (scores - divergence))).mean()


def _sigmoid_loss(margins: Tensor, smoothing: float) -> Tensor:
    """−log σ, as if a share `smoothing` of the pairs were the wrong way round.

    cDPO (Mitchell 2023).
    """
    return -(1 - smoothing) * F.logsigmoid(margins) - smoothing * F.logsigmoid(-margins)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 − eˣ) for x < 0 (Mächler 2012).

    Either of its two forms suffers cancellation in one half of the range.
    """
    near = x > -math.log(2)
    far = torch.where(near, -1.0, x)
    return torch.where(near, torch.log(-torch.expm1(x)), torch.log1p(-far.exp()))


class Likelihood(NamedTuple):
    """What a model makes of the sequences of a batch."""

    summed: Tensor  # log-probability of each answer
    counts: Tensor  # tokens of each answer
    nll: Tensor  # (), the mean over all labels of the first sequences


def likelihood(model: CausalLM, batch: AnswerBatch) -> Likelihood:
    """The log-probabilities of a batch's answers, with gradient unless autograd is off."""
    parts = [batch] if model.supports_packing else batch.unpack()
    values = torch.cat([_label_log_probs(model, part) for part in parts])
    # of the first sequences; of a batch without units, all
    chosen = batch.counts[: batch.units or None]
    nll = -values[: sum(chosen)].mean()
    values = values if batch.answered is None else values.index_select(0, batch.answered)
    assert batch.owner is not None and batch.of_each is not None
    # on CUDA `index_add` adds in another order each time
    summed = values.new_zeros(len(batch.of_each)).index_put((batch.owner,), values, accumulate=True)
    return Likelihood(summed, batch.of_each, nll)


def _label_log_probs(model: CausalLM, batch: Batch) -> Tensor:
    rows = batch.read_by(model)  # (N, D)
    rows = rows if batch.label_index is None else rows.index_select(0, batch.label_index)
    size = chunk_of(model, len(rows))
    return log_probs(model.logits, rows, batch.labels, size, trained_head(model))


class Preference(NamedTuple):
    """The mean loss over the units, (), and the implicit rewards of their answers.

    The rewards, (·,) each, are of the chosen and of the rejected answers; for KTO of the desirable
    and of the undesirable ones.
    """

    loss: Tensor
    chosen: Tensor
    rejected: Tensor


def preference(model: CausalLM, batch: AnswerBatch, settings: PreferenceSettings) -> Preference:
    """The loss of a batch and its rewards."""
    divergence = None
    if batch.mismatched is not None:  # before the activations that backward needs are in memory
        divergence = _divergence(model, batch.mismatched, batch.units)
    like = likelihood(model, batch)
    scores = like.summed / like.counts if batch.reference is None else like.summed - batch.reference
    rewards = settings.beta * scores.detach()

    if divergence is not None:
        assert batch.desirable is not None and batch.by_kind is not None
        loss = kto(scores, batch.desirable, divergence, settings)
        good, bad = rewards.index_select(0, batch.by_kind).tensor_split([batch.liked])
        return Preference(loss, good, bad)

    if settings.loss == "ipo":
        scores = scores / like.counts
    chosen, rejected = scores.chunk(2)
    loss = PAIRED[settings.loss](chosen, rejected, settings).mean()
    if weight := 1.0 if settings.loss == "orpo" else settings.rpo_alpha:
        loss = loss + weight * batch.nll_weight * like.nll
    return Preference(loss, rewards[: batch.units], rewards[batch.units :])


@torch.no_grad()
def _divergence(model: CausalLM, mismatched: AnswerBatch, units: int) -> Tensor:
    """KTO's estimate of the divergence from the reference, (), of the batch on all ranks.

    It is that of answers behind prompts of other examples. A rank without pairs counts nothing.
    """
    assert mismatched.reference is not None
    drift = likelihood(model, mismatched).summed - mismatched.reference
    if not is_distributed():
        return (drift.sum() / len(drift)).clamp(min=0)
    total, count = all_reduce_numbers(*((float(drift.sum()), len(drift)) if units else (0.0, 0)))
    return drift.new_tensor(max(total / count, 0.0))


class PreferencePath(LossPath):
    """The path of one learner on pairs of answers."""

    rewards = True

    def __init__(self, model: CausalLM, settings: PreferenceSettings) -> None:
        super().__init__(model)
        self._settings = settings
        # Of each batch since the last `measured`. `_counts`: answers of both kinds. `_sums`, (3,):
        # the rewards of both kinds, and how many are right.
        self._counts: list[tuple[int, int]] = []
        self._sums: list[Tensor] = []

    def batches(self, orders: Mapping[int, Batches], number: int) -> Iterator[StepBatch]:
        (order,) = orders.values()
        if not isinstance(order, AnswerBatches):  # of the retention loss
            yield from super().batches(orders, number)
            return
        for batch in order[number]:
            assert isinstance(batch, AnswerBatch)
            on_device = batch.to(self._model.device)
            yield StepBatch(on_device, {0: batch.tokens}, units={0: batch.units})

    def losses(self, batch: StepBatch) -> Tensor:
        answers = batch.batch
        assert isinstance(answers, AnswerBatch)
        loss, chosen, rejected = preference(self._model, answers, self._settings)
        if not answers.units:
            return loss
        right = (chosen > 0).sum() + (rejected < 0).sum()
        if answers.mismatched is None:  # pairs
            right = (chosen > rejected).sum()
        self._counts.append((len(chosen), len(rejected)))
        self._sums.append(torch.stack([chosen.sum(), rejected.sum(), right.to(chosen.dtype)]))
        return loss

    def measured(self) -> dict[str, float]:
        """Mean rewards, their margin and accuracy over the batches since the last call.

        Accuracy: the share of pairs whose chosen answer has the higher reward; for KTO of answers
        with the right sign. On all ranks together.
        """
        counts = [sum(column) for column in zip((0, 0), *self._counts, strict=True)]
        sums = torch.tensor(read_numbers(self._sums)).double().view(len(self._sums), 3).sum(0)
        self._counts.clear()
        self._sums.clear()
        good, bad, chosen, rejected, right = all_reduce_numbers(*counts, *map(float, sums))
        if not good + bad:
            return {}
        chosen, rejected = chosen / max(good, 1), rejected / max(bad, 1)
        units = good + bad if self._settings.loss == "kto" else good
        return dict(zip(REWARDS, (chosen, rejected, chosen - rejected, right / units), strict=True))
