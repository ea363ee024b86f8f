"""LoRA+ (Hayou et al. 2024): B has `ratio` times the learning rate of A, against PEFT's
optimizer.
"""

import copy
import math
from collections.abc import Mapping

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor

from pipeline.adapters.attach import tensors
from pipeline.adapters.config import AdapterSpec
from pipeline.models.transformers_model import TransformersModel
from pipeline.stages.methods.lora import FinetuneLora
from pipeline.training.optimizer import FlatOptimizer
from pipeline.training.task import build_optimizer
from tests.helpers.real import stock, toy, with_lora

SPEC = AdapterSpec(3, 6.0, ("q_proj", "v_proj"))
RATE, RATIO = 1e-2, 16.0


def ours_of(dtype: torch.dtype | None = None, saved: bool = False) -> TransformersModel:
    return with_lora(toy("llama", std=0.1, tie_word_embeddings=False), dtype, saved)


def by_peft_key(model: TransformersModel, saved: bool) -> Mapping[str, Tensor]:
    spec = AdapterSpec(3, 6.0, SPEC.targets, saved=model.embedding_and_head if saved else ())
    return tensors(model, spec)


def grads_of(step: int, names: Mapping[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        name: torch.randn(p.shape, generator=generator) / 10 for name, p in sorted(names.items())
    }


def stepped(
    flat: FlatOptimizer, model: TransformersModel, saved: bool, steps: range, clip: float = 0.0
) -> None:
    """Optimizer steps on random gradients."""
    for step in steps:
        places = by_peft_key(model, saved)
        for name, gradient in grads_of(step, places).items():
            assert places[name].grad is not None
            places[name].grad.copy_(gradient)  # type: ignore[union-attr]
        norm = flat.collect_gradients().item()
        if clip:
            flat.clip(0, norm, clip)
        flat.step(RATE / (step + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("clip", [0.0, 1.0])
@pytest.mark.parametrize("saved", [False, True], ids=["matrices", "and embeddings"])
def test_steps_are_those_of_pefts_loraplus_optimizer(
    dtype: torch.dtype, clip: float, saved: bool
) -> None:
    model = ours_of(dtype, saved)
    flat = FlatOptimizer(model, ratios=[RATIO])
    ends = list(model.embedding_and_head) if saved else None
    config = LoraConfig(r=3, lora_alpha=6, target_modules=list(SPEC.targets), modules_to_save=ends)
    peft = get_peft_model(stock(toy("llama", std=0.1, tie_word_embeddings=False)), config)
    theirs = {
        name.replace(".default", "").replace(".modules_to_save", ""): p
        for name, p in peft.named_parameters()
        if p.requires_grad
    }
    assert theirs.keys() == by_peft_key(model, saved).keys()
    adam = create_loraplus_optimizer(peft, torch.optim.Adam, lr=RATE, loraplus_lr_ratio=RATIO)
    base = [group["lr"] for group in adam.param_groups]
    with torch.no_grad():
        for name, p in by_peft_key(model, saved).items():
            theirs[name].copy_(p)
    for step in range(6):
        for name, gradient in grads_of(step, theirs).items():
            # our gradients of 16-bit factors are 16-bit
            narrow = dtype if "lora_" in name else torch.float32
            theirs[name].grad = gradient.to(narrow).float()
        torch.nn.utils.clip_grad_norm_(list(theirs.values()), clip or math.inf)
        for group, rate in zip(adam.param_groups, base, strict=True):
            group["lr"] = rate / (step + 1)
        adam.step()
    stepped(flat, model, saved, range(6), clip)
    masters = {id(p): weights for p, weights in flat.trained()}
    for name, p in by_peft_key(model, saved).items():
        torch.testing.assert_close(
            masters[id(p)], theirs[name].detach(), atol=1e-6, rtol=1e-6, msg=name
        )


def test_the_first_step_moves_b_by_ratio_times_as_much_as_a() -> None:
    """Adam's first step is the learning rate, whatever the gradient."""
    model = ours_of(saved=True)
    before = {name: p.detach().clone() for name, p in by_peft_key(model, True).items()}
    flat = build_optimizer(model, FinetuneLora(learning_rate=RATE, loraplus_ratio=RATIO))
    stepped(flat, model, True, range(1))
    for name, p in by_peft_key(model, True).items():
        expected = RATE * (RATIO if "lora_B" in name else 1)
        moved = (p.detach() - before[name]).abs().median().item()
        assert moved == pytest.approx(expected, rel=1e-3), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_has_one_vector_of_each_kind_and_goes_on_to_the_same_bits(
    dtype: torch.dtype,
) -> None:
    unbroken, stopped, again = (ours_of(dtype, saved=True) for _ in range(3))
    flat, first, second = (
        FlatOptimizer(model, ratios=[RATIO]) for model in (unbroken, stopped, again)
    )
    assert first.state().keys() == {"weights"}
    stepped(flat, unbroken, True, range(5))
    stepped(first, stopped, True, range(2))
    state = copy.deepcopy(first.state())
    assert {name: tuple(t.shape) for name, t in state.items()} == {
        "weights": flat.weights.shape,
        "step": (),
        "exp_avg": flat.weights.shape,
        "exp_avg_sq": flat.weights.shape,
    }
    second.restore(state)
    assert second.steps == 2
    stepped(second, again, True, range(2, 5))
    for name, tensor in flat.state().items():
        assert torch.equal(second.state()[name], tensor), name
    assert all(
        torch.equal(p, q) for p, q in zip(unbroken.parameters(), again.parameters(), strict=True)
    )


def test_a_ratio_of_one_is_plain_adam_to_the_bit() -> None:
    one, other = ours_of(saved=True), ours_of(saved=True)
    plain, same = FlatOptimizer(one), FlatOptimizer(other, ratios=[1.0])
    stepped(plain, one, True, range(4))
    stepped(same, other, True, range(4))
    assert same.tensors()[0] is same.weights and len(same.tensors()) == len(plain.tensors())
    assert all(torch.equal(plain.state()[name], tensor) for name, tensor in same.state().items())
