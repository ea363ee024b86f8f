"""Preference losses against TRL's own trainers on the same batches: losses, rewards and gradients;
KTO's estimate of the divergence, ORPO's likelihood of the prompt."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from pipeline.adapters.attach import tensors
from pipeline.adapters.config import AdapterSpec
from pipeline.data.examples import IGNORED, Window
from pipeline.models.transformers_model import TransformersModel
from pipeline.project.logs.run_log import REWARDS
from pipeline.stages.methods.dpo import FinetuneDpo
from pipeline.training import batches
from pipeline.training.batches import collate
from pipeline.training.losses import log_probs
from pipeline.training.preferences import losses
from pipeline.training.preferences.batches import AnswerBatch, AnswerBatches, answer_batch, batch_of
from pipeline.training.preferences.losses import PreferencePath, likelihood, preference
from tests.helpers.real import ROWS, stock, toy, with_lora
from tests.helpers.trl import CASES, answers_of, compared, reference_of


def sequences(count: int, seed: int = 0) -> list[Window]:
    """Prompts with answers; two and two have the same prompt."""
    found = []
    for pair in range(count // 2):
        prompt = torch.randint(
            3, ROWS, (5 + pair,), generator=torch.Generator().manual_seed(seed + pair)
        ).tolist()
        for number, answer in enumerate((3 + pair % 3, 6 - pair % 2)):
            own = torch.Generator().manual_seed(1000 + seed + 2 * pair + number)
            ids = [*prompt, *torch.randint(3, ROWS, (answer,), generator=own).tolist()]
            labels = [IGNORED] * (len(prompt) - 1) + ids[len(prompt) :]
            found.append(Window(0, tuple(ids[:-1]), tuple(labels)))
    return found


@pytest.mark.parametrize("case", CASES)
def test_losses_rewards_and_gradients_are_trls(tmp_path: Path, case: str) -> None:
    ours, spec = toy("llama"), AdapterSpec(3, 6.0, ("q_proj", "v_proj"))
    plain = stock(ours)
    with_lora(ours)
    found = compared(ours, plain, spec, sequences(6), case, tmp_path)
    assert_close(*found.losses, atol=1e-5, rtol=1e-5)
    for mine, wanted in found.rewards:
        assert mine == pytest.approx(wanted, rel=1e-5, abs=1e-5)
    assert found.gradients.keys() == tensors(ours, spec).keys()
    for gradient, theirs in found.gradients.values():
        assert gradient.abs().max() > 0
        assert_close(gradient, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("trains_head", [False, True])
def test_log_probs_and_their_gradients_are_autograds_however_they_are_chunked(
    trains_head: bool,
) -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=False)
    head.requires_grad_(trains_head)
    labels, upstream = torch.randint(50, (11,)), torch.randn(11)
    plain = torch.randn(11, 8, requires_grad=True)
    values = head(plain).log_softmax(-1)[range(11), labels]
    parameters: list[Tensor] = [plain, *([head.weight] if trains_head else [])]
    wanted = torch.autograd.grad((values * upstream).sum(), parameters)
    for size in (1, 4, 11, 128):
        found = log_probs(head, plain, labels, size, [*head.parameters()] if trains_head else [])
        assert_close(found, values)
        assert_close(torch.autograd.grad((found * upstream).sum(), parameters), wanted)
    none = log_probs(head, plain[:0], labels[:0], 4, [*head.parameters()] if trains_head else [])
    assert (none.shape, none.dtype) == ((0,), torch.float32)


# All labels, some of them, and some before tokens that carry none.
FULL = Window(0, (5, 6, 7), (6, 7, 8))
PARTLY = Window(0, (9, 4, 11, 12), (IGNORED, 11, 12, 13))
TRAILED = Window(0, (9, 4, 11, 14, 5), (IGNORED, 11, 12, IGNORED, IGNORED))


def plain_log_probs(model: TransformersModel, window: Window) -> Tensor:
    values = model(torch.tensor([window.ids]))[0].log_softmax(-1)
    return torch.stack(
        [values[i, label] for i, label in enumerate(window.labels) if label != IGNORED]
    )


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize(
    "windows", [[FULL, FULL], [PARTLY, FULL], [TRAILED, PARTLY, FULL, TRAILED]], ids=len
)
def test_a_likelihood_is_the_sum_of_each_sequences_labels(
    windows: list[Window], packs: bool
) -> None:
    model = with_lora(toy("llama", tie_word_embeddings=False))
    model.supports_packing = packs
    model.head.requires_grad_(True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = likelihood(model, batch_of(answers_of(windows), range(len(windows))))
    values = [plain_log_probs(model, window) for window in windows]
    wanted = torch.stack([value.sum() for value in values])
    assert found.counts.tolist() == [len(value) for value in values]
    assert_close(found.summed, wanted)
    assert_close(found.nll, -torch.cat(values).mean())
    weights = torch.arange(1.0, len(windows) + 1)
    mine = torch.autograd.grad((found.summed * weights).sum(), trained)
    assert_close(mine, torch.autograd.grad((wanted * weights).sum(), trained), rtol=1e-4, atol=1e-5)


def test_with_their_prompts_sequences_are_labelled_up_to_their_last_label_and_their_answers_are_known() -> (
    None
):
    batch = batch_of(answers_of([TRAILED, PARTLY]), [0, 1], whole=1)
    assert batch.labels.tolist() == [4, 11, 12, 11, 12, 13]
    assert batch.counts == (3, 3)
    assert batch.answered is not None and batch.answered.tolist() == [1, 2, 3, 4, 5]
    assert batch.owner is not None and batch.owner.tolist() == [0, 0, 1, 1, 1]
    assert batch.of_each is not None and batch.of_each.tolist() == [2, 3]


@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_what_is_measured_are_means_over_all_batches_since_it_was_measured(loss: str) -> None:
    model, settings = with_lora(toy("llama")), FinetuneDpo(loss=loss, beta=2.0)  # type: ignore[arg-type]
    windows = sequences(10)
    desirable = {"desirable": [True, False, True, True, False]} if loss == "kto" else {}
    answers = answers_of(windows, reference=reference_of(model, answers_of(windows)), **desirable)
    path = PreferencePath(model, settings)
    for step, units in enumerate((2, 2, 1)):
        (batch,) = path.batches({0: AnswerBatches(answers, 2, None)}, step)
        assert (batch.units, batch.labels) == ({0: units}, {0: batch.batch.tokens})
        assert path.losses(batch).isfinite()
    _, chosen, rejected = preference(model, answer_batch(answers, range(5)), settings)
    right = (
        (chosen > rejected).sum() if loss == "dpo" else (chosen > 0).sum() + (rejected < 0).sum()
    )
    means = chosen.mean().item(), rejected.mean().item()
    wanted = dict(zip(REWARDS, (*means, means[0] - means[1], right.item() / 5), strict=True))
    assert means[0] != pytest.approx(means[1]) and 0 < right < 5
    assert path.measured() == pytest.approx(wanted, abs=1e-5)
    assert path.measured() == {}


def test_a_rank_that_gets_no_unit_is_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = answers_of([FULL, PARTLY, TRAILED, FULL, PARTLY, TRAILED])
    plain = AnswerBatches(answers, 2, None)
    assert [
        batch.units for step in (0, 1) for batch in plain[step] if isinstance(batch, AnswerBatch)
    ] == [2, 1]
    monkeypatch.setattr(batches, "shard_for_rank", lambda items: items[1::2])  # rank 1 of 2
    (first,), (last,) = (AnswerBatches(answers, 2, None)[step] for step in (0, 1))
    assert isinstance(first, AnswerBatch) and isinstance(last, AnswerBatch)
    assert (first.units, first.idle, first.counts) == (1, False, (2, 3))
    assert (last.units, last.idle, last.counts) == (0, True, (3, 2)), (
        "it computes as the others do, and counts nothing"
    )


def test_the_smallest_batch_is_the_longest_pair_of_the_first() -> None:
    answers = answers_of(sequences(8))
    batches = AnswerBatches(answers, 2, None, 2)
    longest = max((0, 1), key=answers.tokens)
    alone = batches.longest_alone(0)
    assert isinstance(alone, AnswerBatch) and (alone.units, len(alone.counts)) == (1, 2)
    assert torch.equal(alone.ids, answer_batch(answers, [longest]).ids)


def test_batches_are_in_the_order_of_their_seed_and_orpos_have_labels_on_prompts_too() -> None:
    answers = answers_of(sequences(24))
    lengths = [len(window.ids) for window in answers.windows]
    assert [answers.tokens(n) for n in range(3)] == [
        sum(lengths[2 * n : 2 * n + 2]) for n in range(3)
    ]

    def inputs(seed: int | None) -> list[list[int]]:
        return [
            batch.ids.tolist()
            for step in range(3)
            for batch in AnswerBatches(answers, 4, seed)[step]
        ]

    assert inputs(0) == inputs(0) != inputs(1) != inputs(None) != inputs(0)
    (part,), (whole,) = (
        AnswerBatches(replace(answers, whole=whole), 4, None)[0] for whole in (False, True)
    )
    assert isinstance(part, AnswerBatch) and isinstance(whole, AnswerBatch)
    assert part.answered is None and whole.answered is not None and whole.tokens > part.tokens


def test_a_model_that_packs_nothing_reads_each_sequence_by_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, read, run_body = toy("llama"), list[int](), TransformersModel.run_body

    def counted(self: TransformersModel, inputs: Tensor, *rest: Any, **options: Any) -> Any:
        read.append(inputs.shape[1])
        return run_body(self, inputs, *rest, **options)

    monkeypatch.setattr(TransformersModel, "run_body", counted)
    for model.supports_packing, lengths in ((False, [3, 4, 3]), (True, [10])):
        read.clear()
        likelihood(model, batch_of(answers_of([TRAILED, PARTLY, FULL]), range(3)))
        assert read == lengths


def test_batches_of_the_retention_loss_are_passed_on_and_a_rank_that_saw_nothing_adds_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = PreferencePath(toy("llama"), FinetuneDpo())
    batch, orders = collate([FULL, PARTLY]), cast(Any, {0: {7: [collate([FULL, PARTLY])]}})
    (found,) = path.batches(orders, 7)
    assert found.batch.ids.tolist() == batch.ids.tolist() and found.labels == {0: batch.tokens}
    added = list[tuple[float, ...]]()

    def reduced(*numbers: float) -> list[float]:
        added.append(numbers)
        return [*numbers]

    monkeypatch.setattr(losses, "all_reduce_numbers", reduced)
    assert path.measured() == {} and added == [(0, 0, 0.0, 0.0, 0.0)]


@pytest.mark.parametrize("shift", [-1.0, 1.0])
def test_ktos_divergence_is_of_all_ranks_and_never_negative(
    shift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, settings = with_lora(toy("llama")), FinetuneDpo(loss="kto", beta=0.5)
    windows, desirable = sequences(10), [True, False, True, True, False]
    reference = reference_of(model, answers_of(windows)) + shift
    answers = answers_of(windows, reference=reference, desirable=desirable)
    with torch.no_grad():
        drift = (
            torch.stack([plain_log_probs(model, window).sum() for window in windows]) - reference
        )
    divergence = drift[1::2].mean().clamp(min=0)
    sign = torch.tensor(desirable) * 2.0 - 1
    wanted = 1 - torch.sigmoid(sign * 0.5 * (drift[::2] - divergence))
    assert (divergence > 0) == (shift < 0)
    assert_close(preference(model, answer_batch(answers, range(5)), settings).loss, wanted.mean())

    numbers: list[tuple[float, ...]] = []

    def reduced(*own: float) -> list[float]:
        numbers.append(own)
        return [sum(column) for column in zip(*numbers[:3], strict=True)]

    monkeypatch.setattr(losses, "is_distributed", lambda: True)
    monkeypatch.setattr(losses, "all_reduce_numbers", reduced)
    idle = replace(answer_batch(answers, [0]), idle=True, units=0)
    for _ in range(2):  # once to know the numbers of all three
        found = [
            preference(model, batch, settings).loss.item()
            for batch in (answer_batch(answers, [0, 1, 2]), answer_batch(answers, [3, 4]), idle)
        ]
    assert found[:2] == pytest.approx(
        [wanted[:3].mean().item(), wanted[3:].mean().item()], rel=1e-4
    )
