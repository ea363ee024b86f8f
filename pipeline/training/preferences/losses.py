"""Preference losses on pairs of answers: DPO, IPO, KTO, ORPO and SimPO, with the model itself as
the reference.

A unit of the data is two sequences: the chosen and the rejected answer to a prompt, or for KTO an
answer and another example's answer behind the same prompt, by which it estimates the divergence
from the reference.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.data.examples import IGNORED, Window
from pipeline.data.windows import Parts
from pipeline.models.base import CausalLM
from pipeline.models.device import read_numbers
from pipeline.project.logs.run_log import REWARDS
from pipeline.training.batches import Batch, Batches, collate
from pipeline.training.losses import chunk_of, log_probs
from pipeline.training.parallel.collectives import (
    all_reduce_numbers,
    is_distributed,
    shard_for_rank,
)
from pipeline.training.step import StepBatch, to_model_device

if TYPE_CHECKING:
    from pipeline.training.retention import RetentionLoss

PreferenceLoss = Literal["dpo", "ipo", "kto", "orpo", "simpo"]
WITH_REFERENCE = ("dpo", "ipo", "kto")  # the others compare the model with itself


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


@dataclass(frozen=True)
class Answers:
    """The sequences of a data set, two a unit; `source(n)` is where unit n is from, as file:line.

    `reference`: log-probability of each sequence's answer under the reference, (2n,); None without
    a reference. `desirable`: for KTO, whether each unit's answer is a good one.
    """

    windows: Sequence[Window]
    source: Callable[[int], str]
    parts: Parts
    reference: Tensor | None = None
    desirable: Sequence[bool] = ()

    def __len__(self) -> int:
        return len(self.windows) // 2

    def __getitem__(self, number: int) -> Window:
        """The unit's first sequence; its second is `windows[2 * number + 1]`."""
        return self.windows[2 * number]

    def tokens(self, number: int) -> int:
        return sum(len(self.windows[index].ids) for index in (2 * number, 2 * number + 1))

    def location(self, number: int) -> str:
        return self.source(number)


@dataclass(frozen=True)
class AnswerBatch(Batch):
    """The sequences of n units: the n first ones, then the n second ones; for KTO the first ones
    alone.

    Of the N labels `counts` belong to each sequence. `answered`: the indices of those of an answer;
    None: all are. `owner`: the sequence of each of these, and `of_each`: how many each sequence
    has. `reference`: per sequence. KTO: `desirable` (n,), 1 or 0, of which `liked` are 1; `by_kind`
    (n,) are the units with these first; and the second sequences as a batch of their own,
    `mismatched`. All is made on the CPU: a GPU would be waited for.
    """

    in_chunks: ClassVar[bool] = True

    units: int = 0
    counts: tuple[int, ...] = ()
    answered: Tensor | None = None
    owner: Tensor | None = None
    of_each: Tensor | None = None
    reference: Tensor | None = None
    desirable: Tensor | None = None
    by_kind: Tensor | None = None
    liked: int = 0
    mismatched: "AnswerBatch | None" = None

    def to(self, device: torch.device) -> "AnswerBatch":
        batch = super().to(device)
        assert isinstance(batch, AnswerBatch)
        return (
            batch
            if self.mismatched is None
            else replace(batch, mismatched=self.mismatched.to(device))
        )


class AnswerBatches(Batches):
    """The batches of all epochs, of `batch_size` units each. `whole`: ORPO's, of whose prompts too
    it is the likelihood."""

    def __init__(
        self,
        answers: Answers,
        batch_size: int,
        seed: int | None,
        gradient_accumulation_steps: int = 1,
        first: int = 0,
        whole: bool = False,
    ) -> None:
        super().__init__(answers, batch_size, seed, gradient_accumulation_steps, first)
        self._answers, self._whole = answers, whole

    def _read(self, step: int) -> list[Batch]:
        return [self._batch(numbers) for numbers in self.rows(step)]

    def _batch(self, numbers: Sequence[int]) -> AnswerBatch:
        """That of this rank; an idle one, of the first unit, if it gets none."""
        mine = shard_for_rank(numbers)
        batch = answer_batch(self._answers, mine or numbers[:1], self._whole)
        return batch if mine else replace(batch, idle=True, units=0)


def answer_batch(answers: Answers, units: Sequence[int], whole: bool = False) -> AnswerBatch:
    """The units as one batch. With `whole`, every token of a first sequence carries a label."""
    firsts, seconds = [2 * unit for unit in units], [2 * unit + 1 for unit in units]
    if not answers.desirable:
        return replace(
            batch_of(answers, [*firsts, *seconds], len(units) if whole else 0), units=len(units)
        )
    kinds = [int(answers.desirable[unit]) for unit in units]
    by_kind = torch.tensor(sorted(range(len(units)), key=lambda n: not kinds[n]))
    of_kind: dict[str, Any] = {
        "desirable": torch.tensor(kinds),
        "by_kind": by_kind,
        "liked": sum(kinds),
    }
    return replace(
        batch_of(answers, firsts),
        units=len(units),
        mismatched=batch_of(answers, seconds),
        **of_kind,
    )


def batch_of(answers: Answers, indices: Sequence[int], whole: int = 0) -> AnswerBatch:
    """The sequences `indices` as a batch of no units; of the first `whole` of them every token
    carries a label.
    """
    windows = [answers.windows[index] for index in indices]
    answered, of_each = None, torch.tensor([*map(_labels, windows)])
    if whole:
        marks = [
            label != IGNORED
            for window in windows[:whole]
            for label in _to_last_label(window).labels
        ]
        answered = torch.tensor(marks + [True] * sum(map(_labels, windows[whole:]))).nonzero()[:, 0]
        windows = [*map(_every_label, windows[:whole]), *windows[whole:]]
    batch = collate(windows)
    names = ("ids", "positions", "labels", "label_index", "segments")
    return AnswerBatch(
        **{name: getattr(batch, name) for name in names},
        counts=tuple(map(_labels, windows)),
        answered=answered,
        owner=torch.repeat_interleave(of_each),
        of_each=of_each,
        reference=None if answers.reference is None else answers.reference[[*indices]],
    )


def _labels(window: Window) -> int:
    return sum(label != IGNORED for label in window.labels)


def _to_last_label(window: Window) -> Window:
    stop = 1 + max(i for i, label in enumerate(window.labels) if label != IGNORED)
    return Window(window.start, window.ids[:stop], window.labels[:stop])


def _every_label(window: Window) -> Window:
    """What follows each token as its label, up to the window's last label."""
    window = _to_last_label(window)
    return Window(window.start, window.ids, (*window.ids[1:], window.labels[-1]))


class Likelihood(NamedTuple):
    """Of the sequences of a batch: the summed log-probability of the answer's tokens, their number,
    and the negative mean over all labels of the first sequences, ()."""

    summed: Tensor
    counts: Tensor
    nll: Tensor


def likelihood(model: CausalLM, batch: AnswerBatch) -> Likelihood:
    """With gradient, unless autograd is off."""
    parts = [batch] if model.supports_packing else batch.unpack()
    values = torch.cat([_label_log_probs(model, part) for part in parts])
    nll = -values[: sum(batch.counts[: batch.units or None])].mean()
    values = values if batch.answered is None else values.index_select(0, batch.answered)
    assert batch.owner is not None and batch.of_each is not None
    # on CUDA `index_add` adds in another order each time
    summed = values.new_zeros(len(batch.of_each)).index_put((batch.owner,), values, accumulate=True)
    return Likelihood(summed, batch.of_each, nll)


def _label_log_probs(model: CausalLM, batch: Batch) -> Tensor:
    rows = model.hidden_states(batch.ids, batch.positions, batch.segments).flatten(0, 1)  # (N, D)
    rows = rows if batch.label_index is None else rows.index_select(0, batch.label_index)
    trained = [p for p in model.head.parameters() if p.requires_grad]
    return log_probs(model.logits, rows, batch.labels, chunk_of(model, len(rows)), trained)


class Preference(NamedTuple):
    """The mean loss over the units, (), and the implicit rewards of the better and of the worse
    answers, (·,) each.
    """

    loss: Tensor
    chosen: Tensor
    rejected: Tensor


def preference(model: CausalLM, batch: AnswerBatch, settings: PreferenceSettings) -> Preference:
    """The loss of a batch, as TRL computes it. For what each of them is, see `PAIRED` and `kto`."""
    # before the activations that backward needs are in memory
    divergence = (
        None if batch.mismatched is None else _divergence(model, batch.mismatched, batch.units)
    )
    like = likelihood(model, batch)
    scores = like.summed / like.counts if batch.reference is None else like.summed - batch.reference
    rewards = settings.beta * scores.detach()
    if divergence is not None:
        assert batch.desirable is not None
        loss = kto(scores, batch.desirable, divergence, settings)
        assert batch.by_kind is not None
        good, bad = rewards.index_select(0, batch.by_kind).tensor_split([batch.liked])
        return Preference(loss, good, bad)
    (chosen, rejected), (of_chosen, of_rejected) = scores.chunk(2), like.counts.chunk(2)
    loss = PAIRED[settings.loss](chosen, rejected, of_chosen, of_rejected, settings).mean()
    if weight := 1.0 if settings.loss == "orpo" else settings.rpo_alpha:
        loss = loss + weight * like.nll
    return Preference(loss, rewards[: batch.units], rewards[batch.units :])


@torch.no_grad()
def _divergence(model: CausalLM, mismatched: AnswerBatch, units: int) -> Tensor:
    """KTO's estimate, (), of the divergence from the reference, of the batch on all ranks; one
    without `units` is idle."""
    assert mismatched.reference is not None
    drift = likelihood(model, mismatched).summed - mismatched.reference
    if not is_distributed():
        return (drift.sum() / len(drift)).clamp(min=0)
    total, count = all_reduce_numbers(*((float(drift.sum()), len(drift)) if units else (0.0, 0)))
    return drift.new_tensor(max(total / count, 0.0))


def kto(
    scores: Tensor, desirable: Tensor, divergence: Tensor, settings: PreferenceSettings
) -> Tensor:
    """Ethayarajh et al. 2024, eq. 8, with both weights 1: 1 − σ(±β(score − divergence))."""
    sign = desirable.to(scores.dtype) * 2 - 1
    return (1 - torch.sigmoid(sign * settings.beta * (scores - divergence))).mean()


def _dpo(
    chosen: Tensor, rejected: Tensor, _c: Tensor, _r: Tensor, settings: PreferenceSettings
) -> Tensor:
    return _sigmoid(settings.beta * (chosen - rejected), settings.label_smoothing)


def _simpo(
    chosen: Tensor, rejected: Tensor, _c: Tensor, _r: Tensor, settings: PreferenceSettings
) -> Tensor:
    return _sigmoid(
        settings.beta * (chosen - rejected) - settings.simpo_gamma, settings.label_smoothing
    )


def _sigmoid(margins: Tensor, smoothing: float) -> Tensor:
    """−log σ; smoothed as if so many of the pairs were the wrong way round (cDPO, Mitchell
    2023).
    """
    return -(1 - smoothing) * F.logsigmoid(margins) - smoothing * F.logsigmoid(-margins)


def _ipo(
    chosen: Tensor,
    rejected: Tensor,
    of_chosen: Tensor,
    of_rejected: Tensor,
    settings: PreferenceSettings,
) -> Tensor:
    return (chosen / of_chosen - rejected / of_rejected - 1 / (2 * settings.beta)).square()


def _orpo(
    chosen: Tensor, rejected: Tensor, _c: Tensor, _r: Tensor, settings: PreferenceSettings
) -> Tensor:
    log_odds = chosen - rejected - (_log1mexp(chosen) - _log1mexp(rejected))
    return -settings.beta * F.logsigmoid(log_odds)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 − eˣ) for x < 0, without the cancellation that either form has in one half of the range
    (Mächler 2012).
    """
    near = x > -math.log(2)
    return torch.where(
        near, torch.log(-torch.expm1(x)), torch.log1p(-torch.where(near, -1.0, x).exp())
    )


# Of the scores of both answers, (n,), and their tokens: the log-ratio to the reference, or without
# one the mean log-probability. dpo: Rafailov et al. 2023, eq. 7. ipo: Azar et al. 2023, eq. 17, per
# token. simpo: Meng et al. 2024, eq. 6. orpo: Hong et al. 2024, eq. 6 and 7, to which the
# likelihood of prompt and answer is added.
PAIRED: Mapping[str, Callable[[Tensor, Tensor, Tensor, Tensor, PreferenceSettings], Tensor]] = {
    "dpo": _dpo,
    "ipo": _ipo,
    "simpo": _simpo,
    "orpo": _orpo,
}


class PreferencePath:
    """The path of one learner on pairs of answers: see `LossPath`."""

    rewards = True

    def __init__(self, model: CausalLM, settings: PreferenceSettings) -> None:
        self._model, self._settings = model, settings
        # a batch each: numbers of both kinds; their summed rewards, and how many are right, (3,)
        self._seen: list[tuple[int, int, Tensor]] = []

    @property
    def supports_packing(self) -> bool:
        return self._model.supports_packing

    def batches(self, orders: Mapping[int, Batches], number: int) -> Iterator[StepBatch]:
        (order,) = orders.values()
        for batch in order[number]:
            if isinstance(batch, AnswerBatch):
                yield StepBatch(
                    batch.to(self._model.device), {0: batch.tokens}, units={0: batch.units}
                )
            else:  # of the retention loss
                yield from (
                    StepBatch(one, {0: one.tokens}) for one in to_model_device(self._model, [batch])
                )

    def base(self) -> AbstractContextManager[None]:
        return nullcontext()

    def route(self, batch: StepBatch) -> AbstractContextManager[None]:  # noqa: ARG002
        return nullcontext()

    def losses(self, batch: StepBatch) -> Tensor:
        answers = batch.batch
        assert isinstance(answers, AnswerBatch)
        loss, chosen, rejected = preference(self._model, answers, self._settings)
        if answers.units:
            paired = answers.mismatched is None
            right = (
                (chosen > rejected).sum() if paired else (chosen > 0).sum() + (rejected < 0).sum()
            )
            sums = torch.stack([chosen.sum(), rejected.sum(), right.to(chosen.dtype)])
            self._seen.append((len(chosen), len(rejected), sums))
        return loss

    def divergences(self, batch: StepBatch, retain: "RetentionLoss") -> Tensor:
        return retain.divergence(batch.batch)

    def measured(self) -> dict[str, float]:
        """Mean rewards, their margin and accuracy over all batches since the last call, on all
        ranks.

        Accuracy: the share of pairs whose chosen answer has the higher reward; for KTO of answers
        with the right sign.
        """
        counts = (
            sum(chosen for chosen, _, _ in self._seen),
            sum(rejected for _, rejected, _ in self._seen),
        )
        sums = torch.tensor(
            read_numbers([sums for _, _, sums in self._seen]) if self._seen else [0.0] * 3
        ).double()
        self._seen.clear()
        good, bad, chosen, rejected, right = all_reduce_numbers(
            *counts, *map(float, sums.view(-1, 3).sum(0))
        )
        if not good + bad:
            return {}
        means = chosen / max(good, 1), rejected / max(bad, 1)
        units = good if self._settings.loss != "kto" else good + bad
        return dict(zip(REWARDS, (*means, means[0] - means[1], right / units), strict=True))
