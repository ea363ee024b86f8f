"""The optimizer's bookkeeping: a state taken over, a scale that cannot be halved, a learner that stands still."""

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
        inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(seed)).to(next(model.parameters()).dtype)
        torch.autograd.backward(model(inputs).float().square().mean() * optimizer.scale)
        optimizer.collect_gradients()
        optimizer.step(0.01)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_run_goes_on_from_the_state_of_the_run_that_made_its_weights(dtype: torch.dtype, scaled: bool) -> None:
    model = net(dtype)
    first = FlatOptimizer(model, scaled=scaled)
    stepped(first, model, 3)
    state, saved = copy.deepcopy(first.state()), copy.deepcopy(model)  # saved in the dtype of its parameters
    again = FlatOptimizer(saved, scaled=scaled)
    assert again.steps == 0
    assert again.take_over(state)
    assert again.steps == 3
    assert all(torch.equal(again.state()[name], tensor) for name, tensor in state.items()), "in fp32, as it was"
    stepped(first, model)
    stepped(again, saved)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), saved.parameters(), strict=True))


def test_a_state_of_other_weights_or_settings_is_not_taken_over() -> None:
    model = net()
    optimizer = FlatOptimizer(model)
    stepped(optimizer, model)
    state, before = copy.deepcopy(optimizer.state()), optimizer.weights.clone()
    larger = {name: torch.cat([tensor, tensor], -1) if tensor.dim() else tensor for name, tensor in state.items()}
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
        self.vectors, self.matrices = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(2, 4, 5))

    def loss(self) -> Tensor:
        return self.vectors.square().sum() + self.matrices.square().sum()


def test_a_learner_without_a_rate_stands_still_and_norms_are_of_each() -> None:
    model = Stacked()
    optimizer = FlatOptimizer(model, ratios=(1.0, 1.0))
    before = optimizer.weights.clone()
    torch.autograd.backward(model.loss())
    wanted = torch.stack([torch.cat([model.vectors[n], model.matrices[n].flatten()]) for n in (0, 1)]).norm(dim=1) * 2
    torch.testing.assert_close(optimizer.collect_gradients(), wanted.detach())
    assert model.vectors.grad is None and model.matrices.grad is None, "freed once they are collected"
    optimizer.step(None, 0.01)
    assert torch.equal(optimizer.weights[0], before[0]) and not torch.equal(optimizer.weights[1], before[1])
    assert torch.equal(model.matrices[1].flatten(), optimizer.weights[1, 3:]), "parameters are views"
    for parameter, weights in optimizer.trained():
        assert torch.equal(parameter, weights)
    assert [tuple(weights.shape) for _, weights in optimizer.trained()] == [(2, 3), (2, 4, 5)]
