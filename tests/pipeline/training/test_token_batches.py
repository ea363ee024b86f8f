"""Batches filled with tokens: the examples, the loss and the gradient of a step stay the same."""

from collections.abc import Sequence
from functools import partial
from itertools import chain

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace
from torch import Tensor
from torch.testing import assert_close

from pipeline.adapters.attach import attach
from pipeline.adapters.batched import attach_many
from pipeline.adapters.config import AdapterSpec
from pipeline.stages.methods.dpo import FinetuneDpo
from pipeline.stages.methods.lora import FinetuneLora
from pipeline.training.batched import ManyAdapters
from pipeline.training.batches import Batches, pack
from pipeline.training.optimizer import FlatOptimizer
from pipeline.training.parallel.collectives import rank
from pipeline.training.preferences.batches import AnswerBatches
from pipeline.training.preferences.losses import PreferencePath
from pipeline.training.retention import RetentionLoss
from pipeline.training.step import Evaluation, Gradient, Learner, LossPath, gradients, mean_losses
from pipeline.training.task import build_optimizer
from tests.helpers.fake_ranks import fake_rank
from tests.helpers.ranks import run_ranks
from tests.helpers.real import listed, toy, trained, windows_of, with_lora
from tests.helpers.trl import answers_of, reference_of

LENGTHS = (7, 1, 12, 5, 2, 19, 9, 3, 30, 4, 4, 11)
SIZES = st.lists(st.integers(1, 20), min_size=1, max_size=7)


def fewest(sizes: Sequence[int], most: int) -> int:
    """The least number of bins, by trying all ways; a larger size has a bin of its own."""
    best = len(sizes)

    def place(index: int, loads: list[int]) -> None:
        nonlocal best
        if index == len(sizes):
            best = min(best, len(loads))
            return
        for bin, load in enumerate(loads):
            if load + sizes[index] <= most:
                place(index + 1, [*loads[:bin], load + sizes[index], *loads[bin + 1 :]])
        place(index + 1, [*loads, sizes[index]])

    place(0, [])
    return best


@given(SIZES, st.integers(1, 40), st.integers(1, 4))
@example([5, 5, 5, 5, 4, 4, 4], 16, 1)
def test_bins_hold_every_size_once_within_the_budget_and_are_nearly_as_few_as_can_be(
    sizes: list[int], most: int, parts: int
) -> None:
    bins = pack(sizes, most, parts)
    assert sorted(chain.from_iterable(bins)) == list(range(len(sizes)))
    for numbers in bins:
        assert numbers == sorted(numbers)
        assert sum(sizes[n] for n in numbers) <= most or len(numbers) == 1
    # first-fit decreasing's bound: Dósa 2007
    least = fewest(sizes, most)
    assert len(bins) <= -(-(11 * least / 9 + 6 / 9) // parts) * parts
    assert pack(sizes, most, parts) == bins


def test_bins_are_as_full_as_each_other_and_one_for_each_rank() -> None:
    assert [len(numbers) for numbers in pack([8] * 12, 80)] == [6, 6]
    assert [len(numbers) for numbers in pack([8] * 12, 1000, 3)] == [4, 4, 4]


def settings_of(budget: int) -> FinetuneLora:
    return FinetuneLora(
        batch_size=4, gradient_accumulation_steps=3, window=0, tokens_per_batch=budget
    )


def step_of(
    path: LossPath, learners: Sequence[Learner], optimizer: FlatOptimizer
) -> tuple[dict[int, Gradient], Tensor]:
    """What the first step logs, and its gradient (N, P)."""
    result = gradients(path, learners, range(len(learners)), optimizer, 0)
    return result, optimizer.gradient.clone()


def assert_same_step(
    found: tuple[dict[int, Gradient], Tensor], wanted: tuple[dict[int, Gradient], Tensor]
) -> None:
    """To a millionth of the loss, three of the gradient's length: fp32 sums in another order."""
    for n, result in wanted[0].items():
        assert found[0][n].tokens == result.tokens
        assert found[0][n].loss == pytest.approx(result.loss, rel=1e-6)
        assert found[0][n].norm == pytest.approx(result.norm, rel=1e-6)
        assert (found[0][n].divergence or 0) == pytest.approx(result.divergence or 0, abs=1e-7)
    difference, length = (found[1] - wanted[1]).norm(dim=1), wanted[1].norm(dim=1)  # (N,)
    assert length.min() > 0 and (difference <= 3e-6 * length).all(), difference / length


def lora_step(
    budget: int, packs: bool = True, retains: bool = False
) -> tuple[dict[int, Gradient], Tensor]:
    model, settings = with_lora(toy("llama", std=0.2)), settings_of(budget)
    model.supports_packing = packs
    retain = None
    if retains:
        texts = windows_of((6, 15, 3, 8), seed=5)
        retain = RetentionLoss(
            model,
            listed([type(text)(0, text.ids, text.ids) for text in texts]),
            FinetuneLora(retention_weight=1.0, retention_batch_size=4, tokens_per_batch=budget),
        )
    windows = listed(windows_of(LENGTHS, lambda length: length // 2))
    learner = Learner(settings, Batches.of(windows, settings), retain)
    return step_of(LossPath(model.train()), [learner], FlatOptimizer(model))


@pytest.mark.parametrize("budget", [1, 20, 33, 1000])
def test_a_step_is_the_same_however_its_examples_are_divided(budget: int) -> None:
    assert_same_step(lora_step(budget), lora_step(0))


def test_a_model_that_does_not_pack_takes_the_same_step() -> None:
    assert_same_step(lora_step(33, packs=False), lora_step(0))


def test_retained_texts_are_divided_too() -> None:
    assert_same_step(lora_step(16, retains=True), lora_step(0, retains=True))


@pytest.mark.parametrize("loss", ["dpo", "ipo", "orpo", "simpo", "rpo"])
def test_pairs_stay_together_and_their_step_is_the_same(loss: str) -> None:
    windows = windows_of((9, 7, 14, 12, 6, 17, 8, 8, 21, 5), lambda length: length // 3)

    def step(budget: int) -> tuple[dict[int, Gradient], Tensor]:
        model = with_lora(toy("llama", std=0.1))
        settings = FinetuneDpo(
            loss="dpo" if loss == "rpo" else loss,  # type: ignore[arg-type]
            rpo_alpha=float(loss == "rpo"),
            batch_size=5,
            window=0,
            tokens_per_batch=budget,
        )
        answers = answers_of(windows, whole=loss == "orpo")
        if loss in ("dpo", "ipo", "rpo"):
            answers = answers_of(windows, reference=reference_of(model, answers))
        batches = AnswerBatches.of(answers, settings)
        for rows in batches.rows(0) if budget else ():
            assert sum(map(answers.tokens, rows)) <= budget
        path = PreferencePath(model.train(), settings)
        return step_of(path, [Learner(settings, batches)], FlatOptimizer(model))

    assert_same_step(step(40), step(0))


@pytest.mark.parametrize("packs", [True, False])
def test_the_adapters_of_a_sweep_share_the_budget_and_take_the_same_steps(packs: bool) -> None:
    windows = listed(windows_of(LENGTHS, lambda length: length // 2))
    largest = list[int]()

    def step(budget: int) -> tuple[dict[int, Gradient], Tensor]:
        model, settings = toy("llama"), settings_of(budget)
        model.supports_packing = packs
        torch.manual_seed(1)
        spec = AdapterSpec(3, 6.0, ("q_proj", "v_proj"))
        routing = attach_many(model, [partial(attach, model, spec) for _ in range(3)])
        optimizer = build_optimizer(model, *[settings] * 3)
        optimizer.set_weights(torch.randn(optimizer.weights.shape) * 0.1)
        learners = []
        for seed in range(3):
            own = replace(settings, seed=seed)
            learners.append(Learner(own, Batches.of(windows, own), name=str(seed)))
        path = ManyAdapters(model.train(), routing)
        orders = {n: learner.batches for n, learner in enumerate(learners)}
        batches = list(path.batches(orders, 0))
        largest.append(max(batch.batch.ids.numel() for batch in batches))
        return step_of(path, learners, optimizer)

    assert_same_step(step(60), step(0))
    assert largest[0] <= 60


def rank_step(budget: int, size: int) -> tuple[dict[int, Gradient], list[list[float]], int]:
    """One rank's part of a step of `size` examples: what is logged, its gradient, its calls."""
    windows = listed(windows_of(LENGTHS[:size], lambda length: length // 2))
    model = with_lora(toy("llama"))
    settings = FinetuneLora(batch_size=size, window=0, tokens_per_batch=budget)
    batches = Batches.of(windows, settings)
    learner = Learner(settings, batches)
    found, gradient = step_of(LossPath(model.train()), [learner], FlatOptimizer(model))
    return found, gradient.tolist(), len(batches[0])


@pytest.mark.parametrize(("count", "budget", "size"), [(2, 40, 12), (2, 1000, 12), (3, 40, 2)])
def test_ranks_share_the_batches_and_call_the_model_equally_often(
    count: int, budget: int, size: int
) -> None:
    found, gradient, _ = rank_step(0, size)
    results = run_ranks(count, rank_step, budget, size)
    assert len({calls for _, _, calls in results}) == 1, "FSDP gathers on all ranks at once"
    for logged, of_rank, _ in results:
        assert_same_step((logged, torch.tensor(of_rank)), (found, torch.tensor(gradient)))


def kto_step() -> float:
    """The loss of a step with KTO, whose divergence all ranks estimate together."""
    windows = windows_of((9, 7, 14, 12, 6, 17, 8, 8, 21, 5), lambda length: length // 3)
    model = with_lora(toy("llama", std=0.1))
    answers = answers_of(
        windows,
        reference=reference_of(model, answers_of(windows)),
        desirable=[True, False, True, True, False],
    )
    settings = FinetuneDpo(loss="kto", batch_size=5, window=0, tokens_per_batch=40)
    path = PreferencePath(model.train(), settings)
    learner = Learner(settings, AnswerBatches.of(answers, settings))
    return step_of(path, [learner], FlatOptimizer(model))[0][0].loss


def test_ranks_estimate_ktos_divergence_together_where_one_of_them_is_idle() -> None:
    losses = run_ranks(2, kto_step)
    assert losses[0] == losses[1] == pytest.approx(kto_step(), rel=0.1)


def test_a_budget_that_holds_a_whole_step_is_divided_among_the_ranks() -> None:
    windows = listed(windows_of((10,) * 12))
    seen = list[int]()
    for number in range(3):
        with fake_rank(number, 3):
            (batch,) = Batches(windows, 12, 0, tokens_per_batch=10**6)[0]
            assert rank() == number and not batch.idle
            seen.append(batch.ids.numel())
    assert seen == [40, 40, 40]


def test_a_step_has_the_examples_of_batch_size_times_accumulation_in_every_epoch() -> None:
    windows = listed(windows_of(LENGTHS))
    plain, filled = Batches(windows, 2, 7, 2), Batches(windows, 2, 7, 2, tokens_per_batch=25)
    assert len(plain) == len(filled) == 3
    for step in range(2 * len(plain)):
        of_plain = chain.from_iterable(plain.rows(step))
        assert sorted(of_plain) == sorted(chain.from_iterable(filled.rows(step)))
        assert filled.locations(step) == plain.locations(step)
        read = filled[step]
        assert sum(batch.ids.numel() for batch in read) == sum(
            map(windows.tokens, plain.windows(step))
        )
        filled.read_ahead()
        assert filled[step + 1][0].ids.equal(filled._read(step + 1)[0].ids)
    most = [max(sum(map(windows.tokens, rows)) for rows in filled.rows(n)) for n in range(3)]
    assert filled.largest_step(range(3)) == most.index(max(most))
    longest = max(chain.from_iterable(filled.rows(0)), key=windows.tokens)
    assert filled.longest_alone(0).ids.numel() == windows.tokens(longest)


def test_held_out_examples_fill_batches_and_their_loss_is_the_same() -> None:
    model = with_lora(toy("llama"))
    windows = listed(windows_of(LENGTHS * 3, lambda length: length // 2))
    path, means, calls = LossPath(model), list[float](), list[int]()
    for budget in (0, 60):
        batches = Batches.held_out(windows, settings_of(budget))
        means.append(mean_losses(path, batches, [0], path.losses)[0])
        calls.append(sum(len(batches[number]) for number in range(len(batches))))
    assert means[1] == pytest.approx(means[0], rel=1e-6)
    assert calls == [9, -(-sum(LENGTHS) * 3 // 60)], "no batch is left half empty"


def test_a_run_learns_the_same_with_its_evaluations() -> None:
    windows = listed(windows_of(LENGTHS, lambda length: length // 2))

    def run(budget: int) -> list[tuple[float, float]]:
        model = with_lora(toy("llama"))
        settings = settings_of(budget)
        evaluation = Evaluation(Batches.held_out(windows, settings), every=1, patience=0)
        steps, _ = trained(model, Batches.of(windows, settings), settings, evaluation=evaluation)
        return [(step.loss, step.eval_loss or 0) for step in steps[:8]]

    assert_close(torch.tensor(run(25)), torch.tensor(run(0)), rtol=1e-4, atol=1e-5)
