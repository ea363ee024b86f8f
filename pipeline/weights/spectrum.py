"""Singular values of what was changed: of an adapter's updates, of whole checkpoints (the document's §2.2)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.adapters.low_rank import LowRank, singular_values
from pipeline.errors import UserError
from pipeline.weights.diff import Delta, norm
from pipeline.weights.svd import Read, Singular, singular

RANKS = (1, 2, 4, 8, 16, 64)  # of which is said how much of a change they hold
MOST = 64  # singular values that are looked for in a wide matrix


@dataclass(frozen=True)
class Measured:
    """One tensor: ‖W‖, ‖ΔW‖ and, of a matrix that changed, ΔW's singular values, largest first.

    `whole`: these are all that are not zero; otherwise each is at most `error` of the first away from a true one.
    """

    name: str
    shape: tuple[int, ...]
    before: float
    change: float
    values: tuple[float, ...] = ()
    whole: bool = True
    error: float = 0.0

    @property
    def relative(self) -> float | None:
        """‖ΔW‖ / ‖W‖; None where W is zero."""
        return self.change / self.before if self.before else None

    def energy(self, rank: int) -> float | None:
        """Σσᵢ² up to `rank` / ‖ΔW‖²: the share of the change that the nearest matrix of that rank holds.

        None where that is not known.
        """
        if not self.values or (rank > len(self.values) and not self.whole):
            return None
        return min(1.0, math.fsum(value**2 for value in self.values[:rank]) / self.change**2)

    @property
    def stable_rank(self) -> float | None:
        """‖ΔW‖² / σ₁² (Rudelson and Vershynin 2007): 1 for one direction, n for n as strong ones."""
        return (self.change / self.values[0]) ** 2 if self.values else None

    @property
    def effective_rank(self) -> float | None:
        """exp of the entropy of σᵢ / Σσ (Roy and Vetterli 2007); None where not all are known."""
        total = math.fsum(self.values)
        if not self.values or not self.whole:
            return None
        return math.exp(-math.fsum(v / total * math.log(v / total) for v in self.values if v > 0))

    def rank_of(self, share: float) -> int | None:
        """The least rank that holds so much of the change; None where no known one does."""
        held = 0.0
        for number, value in enumerate(self.values, start=1):
            held += value**2
            if held >= share * self.change**2 * (1 - 1e-12):
                return number
        return None


def measure(delta: Delta, most: int = MOST) -> tuple[Measured, Singular | None]:
    """One tensor's numbers, and the singular vectors of a matrix that changed.

    Raises UserError for a tensor that is not finite.
    """
    before, change = norm(delta.weight), norm(delta.change)
    if not (math.isfinite(before) and math.isfinite(change)):
        raise UserError(f"{delta.name} holds numbers that are not finite. Copy the checkpoint anew, or train it again.")
    if not change or not delta.is_matrix:
        return Measured(delta.name, delta.shape, before, change), None
    found = singular(delta.change, delta.shape[1], most)
    least = min(delta.shape)
    values, whole = tuple(found.values[:least].tolist()), found.whole or least <= most
    return Measured(delta.name, delta.shape, before, change, values, whole, found.error), found


def measure_update(name: str, update: LowRank, weight: Read) -> Measured:
    """One low-rank update of a weight."""
    values = singular_values(update.a, update.b) * update.scale
    change = float(torch.linalg.vector_norm(values))
    shape = (update.b.shape[0], update.a.shape[1])
    return Measured(name, shape, norm(weight), change, tuple(values.tolist()) if change else ())


def overlaps(one: Tensor, other: Tensor) -> Tensor:
    """φ(i, j) = ‖UᵢᵀVⱼ‖² / min(i, j) of the first i of orthonormal U (n, k) and j of V (n, l), (k, l).

    Hu et al. 2021, §7.2: 1 where the smaller subspace lies in the larger, 0 where they have nothing in common. Of two
    random ones max(i, j) / n is expected.
    """
    shared = (one.T @ other).square().cumsum(0).cumsum(1)
    sizes = torch.arange(1, max(shared.shape) + 1)
    return shared / torch.minimum(sizes[: len(shared), None], sizes[None, : shared.shape[1]])


def in_blocks(matrix: Tensor) -> Read:
    """A matrix in memory as one that is read."""

    def read() -> Iterator[tuple[slice, Tensor]]:
        yield slice(0, len(matrix)), matrix

    return read
