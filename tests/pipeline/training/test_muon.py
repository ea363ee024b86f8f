"""Muon on matrices and AdamW on all else, against torch.optim.Muon and torch.optim.AdamW."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pipeline.adapters.attach import attach
from pipeline.adapters.config import AdapterSpec
from pipeline.models.base import CausalLM
from pipeline.project.params.sections import Training
from pipeline.stages.methods.lora import FinetuneLora
from pipeline.training.optimizer import FlatOptimizer
from pipeline.training.optimizer.muon import SIZE, Muon, orthogonalized
from pipeline.training.task import build_optimizer
from tests.helpers.real import toy

RATE, DECAY = 1e-2, 0.1


def trained_in_full(dtype: torch.dtype) -> CausalLM:
    return toy("llama").to(dtype).requires_grad_(True)


def with_adapter(dtype: torch.dtype) -> CausalLM:
    """LoRA and DoRA's magnitudes, new rows, and a norm in full."""
    model = toy("llama").to(dtype)
    spec = AdapterSpec(
        4, 8.0, ("q_proj", "down_proj"), dora=True, saved=("norm",), rows={"embed_tokens": (1, 2)}
    )
    attach(model, spec, dtype)
    return model


def is_muons(name: str) -> bool:
    """The names, written out: linears of blocks, A and B."""
    return name.endswith((".lora_A", ".lora_B", "proj.weight"))


def gradients_at(step: int, model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        name: torch.randn(p.shape, generator=generator).to(p.dtype)
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def stepped(flat: FlatOptimizer, model: nn.Module, steps: range) -> None:
    for step in steps:
        for name, gradient in gradients_at(step, model).items():
            grad = model.get_parameter(name).grad
            assert grad is not None
            grad.copy_(gradient)
        flat.collect_gradients()
        flat.step(RATE / (step + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("made", [trained_in_full, with_adapter])
def test_ten_steps_are_those_of_torchs_muon_on_matrices_and_adamw_on_all_else(
    made: Any, dtype: torch.dtype
) -> None:
    """Embedding, head, norms, magnitudes and rows are AdamW's."""
    model = made(dtype)
    other = copy.deepcopy(model).float()
    settings = FinetuneLora(optimizer="muon", weight_decay=DECAY, adam_beta2=0.95)
    flat = build_optimizer(model, settings)
    by_muon = {name: p for name, p in other.named_parameters() if p.requires_grad}
    by_adam = [by_muon.pop(name) for name in list(by_muon) if not is_muons(name)]
    assert len(by_muon) > 3 and len(by_adam) > 3
    muon = torch.optim.Muon(
        by_muon.values(), lr=RATE, weight_decay=DECAY, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(by_adam, lr=RATE, weight_decay=DECAY, betas=(0.9, 0.95), fused=True)
    for step in range(10):
        stepped(flat, model, range(step, step + 1))
        for name, gradient in gradients_at(step, model).items():
            other.get_parameter(name).grad = gradient.float()
        for theirs in (muon, adamw):
            theirs.param_groups[0]["lr"] = RATE / (step + 1)
            theirs.step()  # type: ignore[no-untyped-call]
        masters = {id(p): weights for p, weights in flat.trained()}
        for name in gradients_at(step, model):
            ours = masters[id(model.get_parameter(name))]
            assert torch.equal(ours, other.get_parameter(name).detach()), (step, name)


def test_a_matrix_has_one_moment_and_all_else_two() -> None:
    model = with_adapter(torch.float32)
    flat = build_optimizer(model, FinetuneLora(optimizer="muon"))
    stepped(flat, model, range(1))
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    state = flat.state()
    assert state["exp_avg"].numel() == sum(sizes.values())
    others = sum(size for name, size in sizes.items() if not is_muons(name))
    assert state["exp_avg_sq"].numel() == others > 0


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 9))
def test_singular_values_of_an_update_are_about_one_and_its_directions_the_matrixs(
    rows: int, columns: int, seed: int
) -> None:
    """Against the exact UVᵀ of a singular value decomposition in fp64."""
    rank = min(rows, columns)
    torch.manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(side, rank)).Q for side in (rows, columns))
    matrix = left @ torch.diag(torch.linspace(0.5, 1, rank)) @ right.T
    found = orthogonalized(matrix).double()
    assert found.shape == matrix.shape
    values = torch.linalg.svdvals(found)[:rank]
    assert values.min() > 0.5 and values.max() < 1.5
    exact = left.double() @ right.T.double()
    assert float((found * exact).sum() / (found.norm() * exact.norm())) > 0.95


@pytest.mark.parametrize("shape", [(4, 64), (64, 4), (32, 32)])
def test_a_step_on_a_matrix_is_as_large_as_one_of_adamw(shape: tuple[int, int]) -> None:
    """So one learning rate does for both: the root mean square is 0.2 of it, as AdamW's often
    is.
    """
    linear = nn.Linear(shape[1], shape[0], bias=False)
    before = linear.weight.detach().clone()
    flat = build_optimizer(linear, Training(optimizer="muon"))
    assert linear.weight.grad is not None
    torch.manual_seed(0)
    linear.weight.grad.copy_(torch.randn(shape))
    flat.collect_gradients()
    flat.step(RATE)
    size = float((linear.weight.detach() - before).square().mean().sqrt())
    assert size == pytest.approx(SIZE * RATE, rel=0.25)


def test_without_a_gradient_a_matrix_only_decays_and_a_learner_without_a_rate_stands_still() -> (
    None
):
    linear = nn.Linear(5, 3)
    before = linear.weight.detach().clone()
    flat = build_optimizer(linear, Training(optimizer="muon", weight_decay=0.5))
    flat.step(0.1)
    torch.testing.assert_close(linear.weight.detach(), before * 0.95)
    now = flat.weights.clone()
    flat.step(None)
    assert torch.equal(flat.weights, now) and math.isfinite(float(now.sum()))


def test_experts_heads_and_embeddings_are_no_matrices_of_muon() -> None:
    model = trained_in_full(torch.float32)
    stacked = nn.Module()
    stacked.register_parameter("gate_up_proj", nn.Parameter(torch.randn(3, 8, 4)))
    model.add_module("experts", stacked)
    found = Muon().matrices(model)
    named = {name for name, p in model.named_parameters() if id(p) in found}
    assert named == {name for name, _ in model.named_parameters() if name.endswith("proj.weight")}
    assert not {model.embedding_name, model.head_name} & {name[:-7] for name in named}
