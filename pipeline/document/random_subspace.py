"""Training in a random subspace: θ = θ₀ + Pθ_d, and θ_d (d,) alone trains (Li et al. 2018; Aghajanyan et al. 2021).

P (D, d) is an isometry: ‖Pθ_d‖ = ‖θ_d‖. A dense Gaussian one takes D·d numbers; here each row has one entry that is
not zero, which takes D, and is as random to a gradient that has no part in how it was drawn.
"""

import math
from typing import Protocol

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.models.base import CausalLM
from pipeline.training.optimizer import FlatAdam, adam_step, zero_moments


class Projection(Protocol):
    """P (D, d), its columns orthonormal."""

    small: int  # d

    def up(self, inner: Tensor) -> Tensor:
        """Pθ_d, (D,)."""

    def down(self, outer: Tensor) -> Tensor:
        """Pᵀg, (d,)."""


class OneHot:
    """Each of D numbers follows one of d, with a sign, ±1/√n where n of them follow the same: P'P = 1 exactly.

    Who follows whom is drawn: a permutation, dealt out in turn. With d = D it is one, with signs.
    """

    def __init__(self, large: int, small: int, seed: int) -> None:
        """Raises UserError for a subspace that is larger than the space."""
        if small > large:
            raise UserError(f"A subspace of {small:,} dimensions is larger than the model, of {large:,} parameters.")
        generator = torch.Generator().manual_seed(seed)
        self.small = small
        self._follows = torch.randperm(large, generator=generator) % small  # (D,)
        signs = 2.0 * torch.randint(0, 2, (large,), generator=generator) - 1
        count = torch.bincount(self._follows, minlength=small)
        self._entries = signs / count.sqrt()[self._follows]  # (D,)

    def up(self, inner: Tensor) -> Tensor:
        return inner[self._follows] * self._entries

    def down(self, outer: Tensor) -> Tensor:
        return outer.new_zeros(self.small).index_add_(0, self._follows, outer * self._entries)


class SubspaceAdam(FlatAdam):
    """Adam on θ_d. Its rate is √(D/d) times the one that is given, so that each weight moves as far as without P."""

    def __init__(self, model: CausalLM, projection: Projection) -> None:
        super().__init__(model)
        self._projection = projection
        self._first = self.weights.detach().clone()  # θ₀
        self._inner = self._first.new_zeros(projection.small)
        self._moments_of_inner = zero_moments(self._inner)
        self._stretch = math.sqrt(len(self._first) / projection.small)

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        assert self.weights.grad is not None
        gradient = self._projection.down(self.weights.grad)
        adam_step(self._inner, gradient, self._moments_of_inner, [(slice(None), learning_rate * self._stretch)])
        self.set_weights(self._first + self._projection.up(self._inner))
        self.clear()
