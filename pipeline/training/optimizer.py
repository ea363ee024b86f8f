"""Adam over all trainable parameters as one vector: one kernel a step, and a state that is three tensors."""

import torch
from torch import Tensor, nn


class FlatAdam:
    """Adam (Kingma & Ba 2015) whose parameters and gradients are views into one vector each.

    Small models spend their step on calls, not on arithmetic: one vector makes the update, the gradient's
    norm and the checkpoint one call each, whatever the number of parameters.
    """

    def __init__(self, model: nn.Module, learning_rate: float) -> None:
        trainable = [p for p in model.parameters() if p.requires_grad]
        self.weights = nn.Parameter(torch.cat([p.detach().flatten() for p in trainable]))
        self.weights.grad = torch.zeros_like(self.weights)
        start = 0
        for p in trainable:
            stop = start + p.numel()
            p.data = self.weights.data[start:stop].view_as(p)
            p.grad = self.weights.grad[start:stop].view_as(p)
            start = stop
        self._adam = torch.optim.Adam([self.weights], lr=learning_rate, fused=True)

    def step(self) -> Tensor:
        """Update from the accumulated gradient and clear it; returns the gradient's norm."""
        assert self.weights.grad is not None
        norm: Tensor = self.weights.grad.norm()
        self._adam.step()
        self.weights.grad.zero_()
        return norm

    def tensors(self) -> list[Tensor]:
        """All that it holds: weights, gradient and, after the first step, both moments."""
        assert self.weights.grad is not None
        return [self.weights, self.weights.grad, *self._adam.state[self.weights].values()]

    def state(self) -> dict[str, Tensor]:
        """Everything a checkpoint needs to go on as if nothing had happened."""
        return {"weights": self.weights.detach(), **self._adam.state[self.weights]}

    def restore(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            self.weights.copy_(state["weights"])
        self._adam.state[self.weights] = {name: value for name, value in state.items() if name != "weights"}
