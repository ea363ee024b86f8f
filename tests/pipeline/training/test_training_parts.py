"""Parts of a step: learning rate, clipping, checkpointing; and an evaluation that holds no
logits.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec import structs
from torch import Tensor, nn
from transformers import (
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_scheduler,
)

from pipeline.data.examples import Example
from pipeline.data.masking import encode
from pipeline.data.tokenizers.subword import SubwordTokenizer
from pipeline.inference import score as measure
from pipeline.inference.engine import LoadedModel
from pipeline.inference.score import score
from pipeline.models.transformers_model import TransformersModel
from pipeline.project.params.sections import Schedule, Training
from pipeline.training.batches import Batches, collate
from pipeline.training.memory.prediction import TensorMemoryMeter
from pipeline.training.optimizer import FlatOptimizer, rate
from tests.helpers.families import FAMILIES, TEXTS, new_project, tokenizer
from tests.helpers.projects import logged_memory, make
from tests.helpers.real import (
    gradient_of,
    listed,
    loss_alone,
    steps_of,
    stock,
    toy,
    trained,
    windows_of,
    with_lora,
)

How = Literal["none", "selective", "full"]
LENGTHS = (9, 3, 14, 6, 2, 11)


def batches() -> Batches:
    return Batches(listed(windows_of(LENGTHS)), 2, 0)


# The learning rate


def rates(schedule: str, warmup: int, total: int, peak: float = 1.0) -> list[float]:
    settings = Training(schedule=schedule, warmup_steps=warmup, learning_rate=peak)  # type: ignore[arg-type]
    return [rate(settings, step, total) for step in range(1, total + 1)]


@given(st.integers(0, 30), st.integers(1, 60), st.floats(1e-6, 10))
@example(5, 5, 1.0)
@example(30, 7, 1.0)
@example(0, 1, 1.0)
def test_rates_follow_their_formulas(warmup: int, total: int, peak: float) -> None:
    warm = min(warmup, total)
    rising = [peak * step / warm for step in range(1, warm + 1)]
    left = total - warm
    assert rates("constant", warmup, total, peak) == pytest.approx([*rising, *[peak] * left])
    assert rates("linear", warmup, total, peak) == pytest.approx(
        [*rising, *[peak * (1 - i / left) for i in range(left)]]
    )
    cosine = [peak * (0.5 + 0.5 * math.cos(math.pi * i / left)) for i in range(left)]
    assert rates("cosine", warmup, total, peak) == pytest.approx([*rising, *cosine])


@given(st.integers(0, 20), st.integers(21, 60))
def test_after_the_warm_up_rates_are_those_of_transformers(warmup: int, total: int) -> None:
    for name, made in (
        ("linear", get_linear_schedule_with_warmup),
        ("cosine", get_cosine_schedule_with_warmup),
    ):
        adam = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        theirs = made(adam, warmup, total).lr_lambdas[0]
        assert rates(name, warmup, total)[warmup:] == pytest.approx(
            [theirs(step) for step in range(warmup, total)]
        )
        assert rates(name, warmup, total)[: max(0, warmup - 1)] == pytest.approx(
            [theirs(s) for s in range(1, warmup)]
        )


@given(
    st.sampled_from(get_args(Schedule)),
    st.integers(0, 20),
    st.integers(21, 400),
    st.floats(0, 0.99),
    st.integers(1, 7),
    st.floats(0.1, 4),
    st.floats(0.01, 1),
)
def test_every_schedule_is_that_of_transformers_to_the_last_step(
    schedule: Any,
    warmup: int,
    total: int,
    least: float,
    cycles: int,
    power: float,
    decaying: float,
) -> None:
    """transformers begins its warm-up at 0, here it ends at the whole rate: it is left out."""
    peak = 3e-4
    decay = min(total - warmup, math.ceil(total * decaying))
    theirs: dict[str, tuple[str, dict[str, float]]] = {
        "constant": ("constant_with_warmup", {}),
        "linear": ("polynomial", {"power": 1.0, "lr_end": least * peak}),
        "cosine": ("cosine_with_min_lr", {"min_lr_rate": least}),
        "cosine_with_restarts": ("cosine_with_restarts", {"num_cycles": cycles}),
        "polynomial": ("polynomial", {"power": power, "lr_end": least * peak}),
        "inverse_sqrt": ("inverse_sqrt", {}),
        "warmup_stable_decay": (
            "warmup_stable_decay",
            {"num_decay_steps": decay, "min_lr_ratio": least},
        ),
    }
    read: dict[str, dict[str, Any]] = {
        "linear": {"min_lr_ratio": least},
        "cosine": {"min_lr_ratio": least},
        "cosine_with_restarts": {"num_cycles": cycles},
        "polynomial": {"power": power, "min_lr_ratio": least},
        "warmup_stable_decay": {"decay_ratio": decaying, "min_lr_ratio": least},
    }
    name, numbers = theirs[schedule]
    sgd = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    made = get_scheduler(name, sgd, warmup, total, scheduler_specific_kwargs=numbers)
    settings = Training(
        schedule=schedule, warmup_steps=warmup, learning_rate=peak, **read.get(schedule, {})
    )
    expected = [peak * made.lr_lambdas[0](step) for step in range(warmup, total)]
    found = [rate(settings, step, total) for step in range(warmup + 1, total + 1)]
    assert found == pytest.approx(expected, rel=1e-12, abs=1e-15 * peak)


@given(st.integers(0, 20), st.integers(21, 400), st.floats(0.01, 0.99), st.integers(1, 7))
def test_restarts_fall_to_the_least_rate_as_well(
    warmup: int, total: int, least: float, cycles: int
) -> None:
    """A cosine from 0 to the peak, squeezed between the least rate and the peak."""
    settings = Training(schedule="cosine_with_restarts", warmup_steps=warmup, num_cycles=cycles)
    plain, raised = (
        [rate(given, step, total) for step in range(warmup + 1, total + 1)]
        for given in (settings, structs.replace(settings, min_lr_ratio=least))
    )
    peak = settings.learning_rate
    assert raised == pytest.approx([least * peak + (1 - least) * value for value in plain])


@given(st.sampled_from(get_args(Schedule)), st.integers(0, 30), st.integers(1, 60))
def test_no_step_learns_nothing_and_none_more_than_the_rate(
    schedule: str, warmup: int, total: int
) -> None:
    found = rates(schedule, warmup, total)
    assert all(0 < value <= 1 for value in found)
    assert max(found) == 1


def test_the_loop_steps_at_these_rates_and_writes_them_down() -> None:
    settings = Training(epochs=4, learning_rate=1e-3, warmup_steps=3, schedule="cosine")
    found, _ = trained(toy("llama"), batches(), settings)
    assert [record.learning_rate for record in found] == [
        rate(settings, step, 12) for step in range(1, 13)
    ]


# Against plain PyTorch


@pytest.mark.parametrize("clip", [0.0, 4.5, 100.0])
def test_clipping_warm_up_and_decay_are_those_of_plain_pytorch(clip: float) -> None:
    """Every sequence alone through stock transformers, torch's clipping, torch's Adam."""
    settings = Training(
        epochs=4, learning_rate=3e-3, warmup_steps=2, schedule="linear", max_grad_norm=clip
    )
    model, order = toy("llama", std=0.1), batches()
    theirs, found = stock(model), windows_of(LENGTHS)
    adam = torch.optim.Adam(theirs.parameters(), lr=1.0)
    clipped = 0
    for record in steps_of(model, order, settings, FlatOptimizer(model)):
        (batch,), (row,) = order[record.step - 1], order.rows(record.step - 1)
        adam.zero_grad()
        loss = torch.stack([loss_alone(theirs, found[n]) for n in row]).sum() / batch.tokens
        torch.autograd.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip or math.inf)
        clipped += bool(clip and norm > clip)
        adam.param_groups[0]["lr"] = rate(settings, record.step, 12)
        adam.step()
        assert record.loss == pytest.approx(loss.item(), rel=1e-4)
        assert record.grad_norm == pytest.approx(float(norm), rel=1e-3), "the norm before clipping"
    assert (2 < clipped < 10) == (clip == 4.5), (
        "Adam would not tell a gradient that is always shortened from any other"
    )
    for name, weight in theirs.named_parameters():
        torch.testing.assert_close(
            model.get_parameter(name), weight, rtol=1e-3, atol=3e-4, msg=name
        )


@given(st.floats(1e-3, 10), st.integers(0, 1000))
def test_a_clipped_gradient_has_the_norm_asked_for_and_its_direction(
    largest: float, seed: int
) -> None:
    torch.manual_seed(seed)
    model = nn.Linear(5, 3)
    optimizer = FlatOptimizer(model)
    torch.autograd.backward(model(torch.randn(4, 5)).square().sum())
    before = torch.cat([p.grad.flatten().clone() for p in model.parameters() if p.grad is not None])
    norm = optimizer.collect_gradients().item()
    optimizer.clip(0, norm, largest)
    after = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    assert float(after.norm()) == pytest.approx(min(norm, largest), rel=1e-5)
    torch.testing.assert_close(after * norm, before * min(norm, largest), rtol=1e-4, atol=1e-6)


# Checkpointing


def step_of(model: TransformersModel, how: How) -> tuple[float, dict[str, Tensor], int]:
    """Loss, gradients and peak of live bytes of one step."""
    model.checkpoint_blocks(how)
    optimizer = FlatOptimizer(model.train())
    batch = collate(windows_of((40, 33, 28, 50, 47, 12)))
    live = TensorMemoryMeter()
    live.watch([*model.parameters(), *optimizer.tensors()])
    with live:
        found = gradient_of(model, [batch], optimizer)
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found.loss, grads, live.peak


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "opt"])
def test_checkpointing_trades_memory_for_time_and_changes_no_number(
    name: str, adapted: bool
) -> None:
    layers: dict[str, Any] = {"n_layer": 6} if name == "gpt2" else {"num_hidden_layers": 6}
    found = {}
    for how in ("none", "selective", "full"):
        model = toy(name, **layers)
        assert model.supports_packing
        if adapted and name != "gpt2":
            with_lora(model)
        found[how] = step_of(model, how)
    loss, grads, most = found["none"]
    for how in ("selective", "full"):
        assert found[how][0] == loss
        assert found[how][1].keys() == grads.keys()
        assert all(torch.equal(grad, grads[key]) for key, grad in found[how][1].items())
    assert found["full"][2] < found["selective"][2] < most
    assert found["full"][2] < 0.75 * most


@pytest.mark.parametrize("how", ["selective", "full"])
def test_pitfall_19_checkpoints_over_frozen_embeddings_let_gradients_through(how: How) -> None:
    model = with_lora(toy("llama", num_hidden_layers=4))
    assert not model.embeddings.weight.requires_grad
    _, grads, _ = step_of(model, how)
    assert len(grads) == 4 * 2 * 2
    assert all(grad.abs().max() > 0 for grad in grads.values())


# Evaluation


WIDE = 20_000  # rows: the logits of one token are many times its hidden state


def short(tokens: int) -> list[Example]:
    return [
        Example(" ".join(TEXTS[: 1 + number % 4]), "e.txt", number)
        for number in range(tokens // 25)
    ]


def long(tokens: int) -> list[Example]:
    return [Example(" ".join([*TEXTS] * (tokens // 56)), "e.txt", 1)]


def scored(
    tmp_path: Path, examples: list[Example], live: TensorMemoryMeter
) -> tuple[int, float, float]:
    """Number of tokens, loss and divergence of a model with a large vocabulary."""
    tokenizer().save_pretrained(tmp_path)
    words = SubwordTokenizer.load(tmp_path)
    shape: dict[str, Any] = {"vocab_size": WIDE, "max_position_embeddings": 8192}
    model, other = (toy("llama", std=std, **shape).eval() for std in (0.1, 0.2))
    live.watch([*model.parameters(), *other.parameters()])
    with live:
        first = score(LoadedModel("base", model, words, tmp_path), examples)
        second = score(LoadedModel("other", other, words, tmp_path), examples, first)
    return len(first.losses), second.loss, second.divergence


@pytest.mark.parametrize("texts", [short, long])
@pytest.mark.sampled(2)
def test_pitfall_23_evaluation_keeps_no_logits(
    tmp_path: Path, texts: Callable[[int], list[Example]]
) -> None:
    few, many = TensorMemoryMeter(), TensorMemoryMeter()
    fewer, *_ = scored(tmp_path, texts(600), few)
    tokens, *_ = scored(tmp_path, texts(5000), many)
    assert tokens > 3000 and fewer > 400
    assert many.peak - few.peak < (tokens - fewer) * WIDE * 4 / 20, (
        "more tokens cost only their hidden states"
    )
    assert many.peak < tokens * WIDE * 4 / 2


def test_pitfall_23_evaluation_in_chunks_is_the_plain_computation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "CHUNK", 7)
    examples = short(250)
    tokens, loss, divergence = scored(tmp_path, examples, TensorMemoryMeter())
    words = SubwordTokenizer.load(tmp_path)
    before, after = (stock(toy("llama", vocab_size=WIDE, std=std)) for std in (0.1, 0.2))
    losses, far = [], []
    with torch.no_grad():
        for one in examples:
            ids = torch.tensor([encode(one, words).ids])
            p, q = (
                theirs(input_ids=ids).logits[0, :-1].log_softmax(-1) for theirs in (before, after)
            )
            losses.append(F.nll_loss(q, ids[0, 1:], reduction="none"))
            far.append(F.kl_div(q, p, reduction="none", log_target=True).sum(-1))
    assert tokens == len(torch.cat(losses)) > 7 * len(examples)
    assert loss == pytest.approx(float(torch.cat(losses).mean()), rel=1e-5)
    assert divergence == pytest.approx(float(torch.cat(far).mean()), rel=1e-3)


# The forecast


def test_the_forecast_is_of_the_largest_batch_of_the_step_that_has_it(tmp_path: Path) -> None:
    root = new_project(tmp_path / "p", FAMILIES["llama"])
    words = " ".join(TEXTS).split()
    lines = [" ".join(words[start % 7 :][: 2 if start % 5 else 14]) for start in range(40)]
    (root / "data/lines.txt").write_text("\n".join(lines), encoding="utf-8")
    make(root, ["pretrain", "expand_vocab"])
    given = ["data=data/lines.txt", "epochs=1", "batch_size=4", "gradient_accumulation_steps=4"]
    for seed in (0, 3):
        make(root, ["finetune_lora"], [f"finetune_lora.{one}" for one in (*given, f"seed={seed}")])
        predicted, measured = logged_memory(root / "runs/finetune_lora/telemetry.csv")
        assert measured == pytest.approx(predicted, rel=0.03)


def test_the_meter_counts_the_tensors_of_its_device_alone() -> None:
    """A paged optimizer's state is in the memory of the host."""
    device, all_ = TensorMemoryMeter(torch.device("meta")), TensorMemoryMeter()
    with device, all_:
        kept = torch.zeros(1024, device="meta"), torch.zeros(2048)
    assert (device.peak, all_.peak) == (4 * 1024, 4 * 3072) and kept
