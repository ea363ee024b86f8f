"""Adam for many adapters at once: a row of one matrix each, with its own learning rates."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from pipeline.training.adam import NAMES, Moments, moments_before, update


class ManyAdam:
    """Adam (Kingma & Ba 2015) on weights (N, P): row n is all that adapter n trains, in fp32.

    What trains are stacked parameters (N, ...), views of it or, in 16 bits, copies. Adam's own step is taken at a rate
    of 1 and put on the weights at each row's rate: one kernel for all, whatever the rates are.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], ratios: Sequence[Tensor | float]) -> None:
        """`ratios`, (N,) or a number for each parameter: by what the learning rate is multiplied for it."""
        self._parameters = list(parameters)
        sizes = [p[0].numel() for p in self._parameters]
        ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
        self._places = [slice(*ends_) for ends_ in pairwise(ends)]
        self.weights = torch.cat([p.detach().flatten(1).float() for p in self._parameters], 1)
        self._ratios = self._spread(ratios)
        self._update = torch.zeros_like(self.weights)
        self.gradient = torch.zeros_like(self.weights)  # (N, P), once gathered
        self._moments = Moments()
        self._wide = all(p.dtype == torch.float32 for p in self._parameters)
        for p, place in zip(self._parameters, self._places, strict=True):
            if p.dtype == torch.float32:
                p.data = self.weights[:, place].view(p.shape)
        self.clear()

    def _spread(self, ratios: Sequence[Tensor | float]) -> Tensor | None:
        """(N, P), or None where all are 1."""
        found = [torch.as_tensor(ratio, device=self.weights.device) for ratio in ratios]
        if all(bool((ratio == 1).all()) for ratio in found):
            return None
        columns = [
            ratio.expand(len(self.weights))[:, None].expand(-1, p[0].numel())
            for ratio, p in zip(found, self._parameters, strict=True)
        ]
        return torch.cat(columns, 1).to(self.weights.dtype)

    @property
    def steps(self) -> int:
        return int(self._moments.get("step", 0))

    def gather(self) -> Tensor:
        """The norm (N,) of each adapter's gradient, as backward left it; to be called once before `step`."""
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        rows = [grad.view(len(grad), -1) for grad in found]
        torch.cat(rows if self._wide else [grad.float() for grad in rows], 1, out=self.gradient)
        self.clear()
        norms: Tensor = self.gradient.norm(dim=1)
        return norms

    def scale(self, factors: Sequence[float]) -> None:
        """Multiply each gathered gradient by its factor; by 0 also what is not finite."""
        by = self.weights.new_tensor(factors)[:, None]
        self.gradient.mul_(by).masked_fill_(by == 0, 0)

    @torch.no_grad()
    def step(self, rates: Sequence[float]) -> None:
        """Update at the adapters' learning rates from the gathered gradients."""
        self._moments = self._moments or moments_before(self.weights)
        update(self._update, self.gradient, self._moments, [(slice(None), 1.0)])
        by = self.weights.new_tensor(rates)[:, None]
        self.weights.addcmul_(self._update, by if self._ratios is None else by * self._ratios)
        self._update.zero_()
        self._publish()

    def clear(self) -> None:
        for p in self._parameters:
            p.grad = None

    @torch.no_grad()
    def set_weights(self, weights: Tensor) -> None:
        self.weights.copy_(weights)
        self._publish()

    def _publish(self) -> None:
        for p, place in zip(self._parameters, self._places, strict=True) if not self._wide else ():
            if p.dtype != torch.float32:
                p.data.copy_(self.weights[:, place].view(p.shape))

    def tensors(self) -> list[Tensor]:
        """All that it holds."""
        ratios = [] if self._ratios is None else [self._ratios]
        return [self.weights, self._update, self.gradient, *ratios, *self._moments.values()]

    def state(self) -> dict[str, Tensor]:
        """Everything a checkpoint needs to go on as if nothing had happened."""
        return {"weights": self.weights, **self._moments}

    def restore(self, state: dict[str, Tensor]) -> None:
        self.set_weights(state["weights"])
        self._moments = {name: state[name].to(self.weights.device) for name in NAMES if name in state}
