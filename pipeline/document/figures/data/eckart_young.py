"""The best low-rank approximation of an update and its error (Eckart–Young), in two dimensions and in general."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]


def best_of_rank(change: Matrix, rank: int) -> Matrix:
    """σ₁u₁v₁ᵀ + … + σᵣuᵣvᵣᵀ, the matrix of rank r nearest to ΔW (Eckart & Young 1936)."""
    u, s, vt = np.linalg.svd(change, full_matrices=False)
    best: Matrix = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return best


def share_of_rank(values: Sequence[float], rank: int) -> float:
    """The share of ‖ΔW‖² in its best approximation of rank r: Σσᵢ² of the first r values over all; 1 if ΔW = 0."""
    squares = np.square(values)
    return float(squares[:rank].sum() / squares.sum()) if squares.sum() else 1.0


@dataclass(frozen=True)
class Plane:
    """W and ΔW as 2 × 2 matrices; `values`: all singular values of the full ΔW."""

    name: str
    weight: Matrix
    change: Matrix
    values: tuple[float, ...]

    @classmethod
    def of(cls, name: str, weight: Matrix, change: Matrix) -> "Plane":
        """Project W and ΔW onto the first two right (inputs) and left (outputs) singular vectors of ΔW.

        ΔW becomes diag(σ₁, σ₂). Signs are fixed so that the largest entry of each left vector is positive.
        """
        u, s, vt = np.linalg.svd(change, full_matrices=False)
        signs = np.sign(u[np.abs(u).argmax(axis=0), np.arange(len(s))])
        u, vt = (u * signs)[:, :2], (vt * signs[:, None])[:2]
        return cls(name, u.T @ weight @ vt.T, np.diag(s[:2]), tuple(map(float, s)))

    @classmethod
    def example(cls, name: str, weight: Sequence[float], change: Sequence[float]) -> "Plane":
        """From four numbers each, row by row."""
        w, d = (np.array(numbers, dtype=np.float64).reshape(2, 2) for numbers in (weight, change))
        return cls(name, w, d, tuple(map(float, np.linalg.svd(d, compute_uv=False))))

    @property
    def update(self) -> Matrix:
        """BA: the best approximation of ΔW of rank 1."""
        return best_of_rank(self.change, 1)

    @property
    def pair(self) -> tuple[float, float]:
        """The two largest singular values."""
        return self.values[0], self.values[1]

    @property
    def ratio(self) -> float:
        """σ₂/σ₁: the largest distance between the two ellipses, relative to how far ΔW moves a point; 0 if ΔW = 0."""
        first, second = self.pair
        return second / first if first else 0.0


def circle(points: int) -> Matrix:
    """Unit vectors (2, points); the last equals the first."""
    angles = np.linspace(0, 2 * np.pi, points)
    return np.stack((np.cos(angles), np.sin(angles)))


def farthest(plane: Plane) -> tuple[Matrix, Matrix]:
    """(W + ΔW)x and (W + BA)x where they are farthest apart for |x| = 1: at x = v₂, with distance σ₂."""
    x = np.linalg.svd(plane.change)[2][1]
    return (plane.weight + plane.change) @ x, (plane.weight + plane.update) @ x
