"""Training in a random subspace: θ = θ₀ + Pθ_d, where only θ_d (d,) trains (Li et al. 2018;
Aghajanyan et al. 2021).

P (D, d) is an isometry: ‖Pθ_d‖ = ‖θ_d‖. A dense Gaussian P takes D·d numbers. Here each row of P
has a single nonzero entry, which takes D numbers; the draw is independent of the gradient, so the
subspace is random all the same.
"""

import math

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.models.base import CausalLM
from pipeline.training.optimizer import AdamW, FlatOptimizer, Span


class OneHot:
    """P (D, d) with one nonzero entry per row: ±1/√n, where n rows share its column. So PᵀP = 1
    exactly.

    The columns come from a random permutation modulo d, so that all n differ by at most 1. With d =
    D, P is a signed permutation.
    """

    def __init__(self, large: int, small: int, seed: int) -> None:
        """Raises UserError if small > large."""
        if small > large:
            raise UserError(
                f"a subspace of {small:,} dimensions is larger than the model ({large:,} "
                "parameters). Use fewer."
            )
        generator = torch.Generator().manual_seed(seed)
        self.small = small
        self._columns = torch.randperm(large, generator=generator) % small  # (D,)
        signs = 2.0 * torch.randint(0, 2, (large,), generator=generator) - 1
        count = torch.bincount(self._columns, minlength=small)
        self._entries = signs / count.sqrt()[self._columns]  # (D,)

    def to(self, device: torch.device) -> "OneHot":
        """Drawn on the CPU, so that a seed means the same on every device; then moved."""
        self._columns, self._entries = self._columns.to(device), self._entries.to(device)
        return self

    def up(self, inner: Tensor) -> Tensor:
        """Pθ_d, (D,)."""
        return inner[self._columns] * self._entries

    def down(self, outer: Tensor) -> Tensor:
        """Pᵀg, (d,)."""
        return outer.new_zeros(self.small).index_add_(0, self._columns, outer * self._entries)


class SubspaceAdam(FlatOptimizer):
    """Adam on θ_d. The learning rate is multiplied by √(D/d), so that each weight moves as far as
    without P.
    """

    def __init__(self, model: CausalLM, projection: OneHot) -> None:
        super().__init__(model)
        self._projection = projection.to(self.weights.device)
        self._initial = self.weights.clone()  # θ₀
        self._inner = self._initial.new_zeros(projection.small)
        self._adam = AdamW()
        self._inner_state = self._adam.zeros(self._inner, [Span(0, projection.small)])
        self._rate_factor = math.sqrt(self._initial.numel() / projection.small)

    def step(self, *rates: float | None) -> None:
        (rate,) = rates
        assert rate is not None
        gradient = self._projection.down(self.gradient[0])
        span = Span(0, self._projection.small, rate * self._rate_factor)
        self._adam.update(self._inner, gradient, self._inner_state, [span])
        self.set_weights(self._initial + self._projection.up(self._inner))
        self.clear()
