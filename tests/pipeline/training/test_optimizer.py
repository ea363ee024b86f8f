"""The optimizer's bookkeeping: a state taken over, a scale that cannot be halved, a learner that
stands still.
"""

import copy

import pytest
import torch
from torch import Tensor, nn

from pipeline.training.optimizer import LARGEST_SCALE, FlatOptimizer


def net(dtype: torch.dtype = torch.float32, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).to(dtype)


def stepped(optimizer: FlatOptimizer, model: nn.Module, steps: int = 1) -> None:
    for seed in range(steps):
        inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)).to(
            next(model.parameters()).dtype
        )
        torch.autograd.backward(model(inputs).float().square().mean() * optimizer.scale)
        optimizer.collect_gradients()
        optimizer.step(0.01)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_run_goes_on_from_the_state_of_the_run_that_made_its_weights(
    dtype: torch.dtype, scaled: bool
) -> None:
    model = net(dtype)
    first = FlatOptimizer(model, scaled=scaled)
    stepped(first, model, 3)
    # saved in the dtype of its parameters
    state, saved = copy.deepcopy(first.state()), copy.deepcopy(model)
    again = FlatOptimizer(saved, scaled=scaled)
    assert again.steps == 0
    assert again.take_over(state)
    assert again.steps == 3
    assert all(torch.equal(again.state()[name], tensor) for name, tensor in state.items()), (
        "in fp32, as it was"
    )
    stepped(first, model)
    stepped(again, saved)
    assert all(
        torch.equal(p, q) for p, q in zip(model.parameters(), saved.parameters(), strict=True)
    )


def test_a_state_of_other_weights_or_settings_is_not_taken_over() -> None:
    model = net()
    optimizer = FlatOptimizer(model)
    stepped(optimizer, model)
    state, before = copy.deepcopy(optimizer.state()), optimizer.weights.clone()
    larger = {
        name: torch.cat([tensor, tensor], -1) if tensor.dim() else tensor
        for name, tensor in state.items()
    }
    without = {name: tensor for name, tensor in state.items() if name != "exp_avg"}
    scaled = {**state, "loss_scale": torch.tensor([2.0, 0.0])}
    for other in (larger, without, scaled, {**state, "weights": state["weights"] + 1e-3}):
        assert not optimizer.take_over(other)
        assert torch.equal(optimizer.weights, before) and optimizer.steps == 1
    assert not FlatOptimizer(net(seed=1)).take_over(state)


def test_a_scale_is_halved_down_to_one_and_an_unscaled_run_has_none() -> None:
    optimizer = FlatOptimizer(net(), scaled=True)
    scales = [optimizer.scale]
    while optimizer.skip():
        scales.append(optimizer.scale)
    assert scales == [LARGEST_SCALE / 2**n for n in range(17)] and scales[-1] == 1
    plain = FlatOptimizer(net())
    assert not plain.skip() and plain.scale == 1


class Stacked(nn.Module):
    """Two learners' vectors (2, 3) and matrices (2, 4, 5)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.vectors, self.matrices = (
            nn.Parameter(torch.randn(2, 3)),
            nn.Parameter(torch.randn(2, 4, 5)),
        )

    def loss(self) -> Tensor:
        return self.vectors.square().sum() + self.matrices.square().sum()


def test_a_learner_without_a_rate_stands_still_and_norms_are_of_each() -> None:
    model = Stacked()
    optimizer = FlatOptimizer(model, ratios=(1.0, 1.0))
    before = optimizer.weights.clone()
    torch.autograd.backward(model.loss())
    wanted = (
        torch.stack(
            [torch.cat([model.vectors[n], model.matrices[n].flatten()]) for n in (0, 1)]
        ).norm(dim=1)
        * 2
    )
    torch.testing.assert_close(optimizer.collect_gradients(), wanted.detach())
    assert model.vectors.grad is None and model.matrices.grad is None, (
        "freed once they are collected"
    )
    optimizer.step(None, 0.01)
    assert torch.equal(optimizer.weights[0], before[0]) and not torch.equal(
        optimizer.weights[1], before[1]
    )
    assert torch.equal(model.matrices[1].flatten(), optimizer.weights[1, 3:]), (
        "parameters are views"
    )
    for parameter, weights in optimizer.trained():
        assert torch.equal(parameter, weights)
    assert [tuple(weights.shape) for _, weights in optimizer.trained()] == [(2, 3), (2, 4, 5)]


def test_a_learner_whose_layer_nobody_used_has_no_gradient_there() -> None:
    """Autograd leaves no gradient where no learner in the batch has that layer."""
    model = Stacked()
    optimizer = FlatOptimizer(model, ratios=(1.0, 1.0))
    torch.autograd.backward(model.vectors.square().sum())
    torch.testing.assert_close(
        optimizer.collect_gradients(), 2 * model.vectors.detach().norm(dim=1)
    )
    assert not optimizer.gradient[:, 3:].any()


def test_16_bit_learners_step_as_their_fp32_weights_and_read_them_rounded() -> None:
    half, full = Stacked().to(torch.bfloat16), Stacked().to(torch.bfloat16).float()
    optimizers = [FlatOptimizer(model, ratios=(1.0, 1.0)) for model in (half, full)]
    held = {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
        for each in optimizers[0].tensors()
    }
    assert sum(held.values()) == 46 * (4 + 4 + 2), "no 16-bit gradients: autograd has its own"
    for model, optimizer in zip((half, full), optimizers, strict=True):
        # exact in 16 bits
        torch.autograd.backward((model.vectors * 0.5).sum() - model.matrices.sum())
        optimizer.collect_gradients()
        optimizer.step(1e-3, 2e-3)
    torch.testing.assert_close(optimizers[0].weights, optimizers[1].weights)
    for (parameter, weights), (other, _) in zip(
        optimizers[0].trained(), optimizers[1].trained(), strict=True
    ):
        assert parameter.dtype == torch.bfloat16
        torch.testing.assert_close(weights, other.data)
        assert torch.equal(parameter, weights.bfloat16())


def named_layers(dtypes: tuple[torch.dtype, ...]) -> nn.Module:
    """Layers with a lora_A and a lora_B each, filled with their number."""
    model = nn.Module()
    for n, dtype in enumerate(dtypes):
        layer = nn.Module()
        layer.lora_B, layer.lora_A = (
            nn.Parameter(torch.full((2,), value).to(dtype)) for value in (n + 0.5, float(n))
        )
        model.add_module(f"layer{n}", layer)
    return model


def test_a_row_is_ordered_by_dtype_and_then_by_rate_so_that_each_is_one_block() -> None:
    """A checkpoint holds a row as it is: in another order, those of earlier versions would train on
    scrambled.
    """
    full, half = torch.float32, torch.bfloat16
    mixed = FlatOptimizer(named_layers((full, half, full)), ratios=(4.0,))
    assert mixed.weights[0, ::2].tolist() == [1.0, 1.5, 0.0, 2.0, 0.5, 2.5]
    assert len(mixed.tensors()) == 4, "weights, gradient, and the copies of both of the 16-bit ones"
    plain = FlatOptimizer(named_layers((full, half, full)))
    assert plain.weights[0, ::2].tolist() == [1.5, 1.0, 0.5, 0.0, 2.5, 2.0]
    assert [tensor.numel() for tensor in plain.tensors()] == [12, 12, 4, 4]


def test_gradients_of_16_bit_parameters_are_collected_and_forgotten() -> None:
    model = net(torch.bfloat16)
    optimizer = FlatOptimizer(model)
    inputs = torch.ones(1, 4, dtype=torch.bfloat16)
    norms = []
    for _ in range(2):
        torch.autograd.backward(model(inputs).sum())
        norms.append(float(optimizer.collect_gradients()))
        optimizer.clear()
        assert float(optimizer.collect_gradients()) == 0
    plain = net(torch.bfloat16)
    torch.autograd.backward(plain(inputs).sum())
    wanted = torch.cat(
        [p.grad.flatten().float() for p in plain.parameters() if p.grad is not None]
    ).norm()
    assert norms == pytest.approx([float(wanted)] * 2)


def test_the_scale_doubles_after_so_many_steps_without_an_overflow_up_to_its_largest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("pipeline.training.optimizer.GROWS_AFTER", 3)
    model = net()
    optimizer = FlatOptimizer(model, scaled=True)
    stepped(optimizer, model, 4)
    assert optimizer.scale == LARGEST_SCALE
    scales = []
    for skips in (True, False, False, False, False, False):
        if skips:
            optimizer.skip()  # the steps before it do not count
        stepped(optimizer, model)
        scales.append(optimizer.scale / LARGEST_SCALE)
    assert scales == [0.5, 0.5, 1, 1, 1, 1]
    again = FlatOptimizer(net(), scaled=True)
    again.skip()
    again.restore(optimizer.state())
    assert torch.equal(again.state()["loss_scale"], optimizer.state()["loss_scale"])
    assert "loss_scale" not in FlatOptimizer(net()).state()


def test_a_state_of_before_the_first_step_can_be_restored_after_some() -> None:
    model = net()
    optimizer = FlatOptimizer(model)
    start = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    stepped(optimizer, model, 2)
    once = optimizer.weights.clone()
    optimizer.restore(start)
    assert optimizer.steps == 0 and torch.equal(optimizer.weights, start["weights"])
    stepped(optimizer, model, 2)
    assert torch.equal(optimizer.weights, once)


def test_decay_without_a_gradient_shrinks_each_learner_by_its_own() -> None:
    """AdamW, decoupled: w ← w − rate · decay · w."""
    model = Stacked()
    optimizer = FlatOptimizer(model, ratios=(1.0, 1.0), decays=(0.0, 0.5))
    before = optimizer.weights.clone()
    optimizer.step(0.1, 0.1)
    torch.testing.assert_close(optimizer.weights, before * torch.tensor([[1.0], [0.95]]))
    assert torch.equal(model.vectors, optimizer.weights[:, :3])
