"""Singular values of changes: of an adapter's updates, or of two checkpoints' difference.

A matrix M (O, I) is read a block of rows at a time and need not fit in memory. Up to `FULL_COLUMNS`
columns all its singular values are computed, from MᵀM (I, I) in fp64: those below 1e-8 of the
largest are lost to rounding. Of wider matrices the largest are computed, by subspace iteration with
MᵀM on a random start (Halko, Martinsson and Tropp 2011, section 4.5), with a measured error bound.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.adapters.low_rank import LowRank, singular_values
from pipeline.models.device import device_for_matrix
from pipeline.weights.blocks import Read
from pipeline.weights.diff import Delta, finite_norm, norm

RANKS = (1, 2, 4, 8, 16, 64)  # ranks whose share of a change is reported
MAX_VALUES = 64  # singular values computed for a wide matrix
FULL_COLUMNS = 1024  # up to so many columns all singular values are computed
# dimensions of the random subspace beyond those wanted (oversampling); the last ones converge
# slowly
EXTRA = 32
# Reads of a wide matrix. A change of low rank is exact to rounding after 4; in pure noise, the
# worst case, 2 leave an error of 16% of σ₁ (1500 × 2048, 64 values), 6 one of 3%, 12 one of 1%.
PASSES = 6


class Singular(NamedTuple):
    """Singular values (k,), largest first, on the CPU, and right vectors (I, k) on their device.

    `error`: each value is within `error`·σ₁ of a singular value of M; 0 if all are known.
    """

    values: Tensor
    right: Tensor
    error: float

    @property
    def complete(self) -> bool:
        """Whether these are all singular values of M."""
        return self.right.shape[0] == self.right.shape[1]


@torch.no_grad()
def singular(read: Read, columns: int, count: int) -> Singular:
    """Singular values of a matrix: all up to `FULL_COLUMNS` columns, else the `count` largest.

    For orthonormal V, the eigenvalues of VᵀMᵀMV are σ² of M if V is square, and lower bounds of
    them otherwise.
    """
    complete = columns <= FULL_COLUMNS
    device = device_for_matrix(columns**2)
    if complete:
        basis = torch.eye(columns, dtype=torch.float64).to(device)
    else:  # always from the same seed, so that two runs give the same numbers
        generator = torch.Generator().manual_seed(0)
        size = (columns, min(columns, count + EXTRA))
        drawn = torch.randn(size, dtype=torch.float64, generator=generator)
        basis = torch.linalg.qr(drawn.to(device)).Q  # (I, n), orthonormal
    image = gram_times(read, basis)
    for _ in range(0 if complete else PASSES - 1):
        # orthonormal again each time: otherwise all columns turn to the first singular vector
        basis = torch.linalg.qr(image).Q
        image = gram_times(read, basis)
    squares, rotation = torch.linalg.eigh(basis.T @ image)  # ascending
    # rounding leaves a zero slightly negative
    squares, rotation = squares.flip(0).clamp(min=0), rotation.flip(1)
    if not complete:
        squares, rotation = squares[:count], rotation[:, :count]
    values, right = squares.sqrt(), basis @ rotation  # (k,), (I, k)
    if complete or not values[0]:
        return Singular(values.cpu(), right, 0.0)
    # The residual ‖Mᵀu − σv‖, for u = Mv/σ, bounds how far σ is from a singular value of M (Parlett
    # 1998, section 4.5). Times σ it is ‖MᵀMv − σ²v‖.
    scaled = torch.linalg.vector_norm(image @ rotation - right * values.square(), dim=0)  # (k,)
    residuals = (scaled / values.clamp(min=1e-300)).clamp(max=float(values[0]))
    return Singular(values.cpu(), right, float(residuals.max() / values[0]))


def gram_times(read: Read, basis: Tensor) -> Tensor:
    """MᵀMV for V (I, n), in fp64."""
    product = torch.zeros_like(basis)
    for _, block in read():
        wide = block.to(basis)  # its device and dtype
        product += wide.T @ (wide @ basis)
    return product


@torch.no_grad()
def factors(read: Read, rows: int, svd: Singular, rank: int) -> tuple[Tensor, Tensor]:
    """B (O, R) and A (R, I) whose product is nearest to M: U√S and √SVᵀ, in fp32.

    Eckart and Young 1936.
    """
    right = svd.right[:, :rank]  # (I, R)
    left = right.new_empty(rows, right.shape[1])
    for part, block in read():
        left[part] = block.to(right) @ right  # US
    # σ as the norm of Mv: the square root of an eigenvalue of MᵀM is wrong where σ is below 1e-8 of
    # the largest
    root = torch.linalg.vector_norm(left, dim=0).sqrt()
    return (left / root.clamp(min=1e-150)).float().cpu(), (root[:, None] * right.T).float().cpu()


@dataclass(frozen=True)
class Measured:
    """The change of one tensor."""

    name: str
    shape: tuple[int, ...]
    before: float  # ‖W‖
    change: float  # ‖ΔW‖
    values: tuple[float, ...] = ()  # singular values of ΔW, largest first, of a changed matrix
    complete: bool = True  # `values` are all that are not zero
    error: float = 0.0  # otherwise each is within `error`·σ₁ of a true singular value

    @property
    def relative(self) -> float | None:
        """‖ΔW‖ / ‖W‖; None if W is zero."""
        return self.change / self.before if self.before else None

    def energy(self, rank: int) -> float | None:
        """Σσᵢ² up to `rank` / ‖ΔW‖²: what the best approximation of that rank captures.

        None if too few singular values are known.
        """
        if not self.values or (rank > len(self.values) and not self.complete):
            return None
        return min(1.0, math.fsum(value**2 for value in self.values[:rank]) / self.change**2)

    @property
    def stable_rank(self) -> float | None:
        """‖ΔW‖² / σ₁²: 1 for one direction, n for n equally strong ones.

        Rudelson and Vershynin 2007.
        """
        return (self.change / self.values[0]) ** 2 if self.values else None

    @property
    def effective_rank(self) -> float | None:
        """exp of the entropy of σᵢ / Σσ (Roy and Vetterli 2007); None if values are unknown."""
        total = math.fsum(self.values)
        if not self.values or not self.complete:
            return None
        return math.exp(-math.fsum(v / total * math.log(v / total) for v in self.values if v > 0))

    def rank_of(self, share: float) -> int | None:
        """The lowest rank that captures `share` of the change; None if too few values are known."""
        return lowest_rank([value**2 for value in self.values], share * self.change**2)


def lowest_rank(squares: Sequence[float], wanted: float) -> int | None:
    """How many of the squared singular values add up to `wanted`; None if all are less."""
    enough = wanted * (1 - 1e-12)  # less what rounding may take from the sum
    for rank, held in enumerate(accumulate(squares), start=1):
        if held >= enough:
            return rank
    return None


def measure(delta: Delta, max_values: int = MAX_VALUES) -> tuple[Measured, Singular | None]:
    """The spectrum of one tensor's change, and its singular vectors if it is a matrix that changed.

    Raises UserError for a tensor that is not finite.
    """
    before, change = (finite_norm(delta.name, read) for read in (delta.weight, delta.change))
    if not change or not delta.is_matrix:
        return Measured(delta.name, delta.shape, before, change), None
    vectors = singular(delta.change, delta.shape[1], max_values)
    smaller = min(delta.shape)
    values = tuple(vectors.values[:smaller].tolist())
    complete = vectors.complete or smaller <= max_values
    measured = Measured(delta.name, delta.shape, before, change, values, complete, vectors.error)
    return measured, vectors


def measure_update(name: str, update: LowRank, weight: Read) -> Measured:
    """The spectrum of a low-rank update of `weight`."""
    values = singular_values(update.a, update.b) * update.scale
    change = float(torch.linalg.vector_norm(values))
    shape = (update.b.shape[0], update.a.shape[1])
    return Measured(name, shape, norm(weight), change, tuple(values.tolist()) if change else ())


def in_blocks(matrix: Tensor) -> Read:
    """A matrix in memory in the form of `Read`, as a single block."""

    return lambda: iter([(slice(0, len(matrix)), matrix)])
