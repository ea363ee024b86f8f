"""The best update of rank 1, and how far it is from the whole one: Eckart and Young, in two dimensions and in all."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]


def best_of_rank(change: Matrix, rank: int) -> Matrix:
    """σ₁u₁v₁ᵀ + … + σᵣuᵣvᵣᵀ, of all matrices of rank r the nearest to ΔW (Eckart & Young 1936)."""
    u, s, vt = np.linalg.svd(change, full_matrices=False)
    best: Matrix = (u[:, :rank] * s[:rank]) @ vt[:rank]
    return best


def share_of_rank(values: Sequence[float], rank: int) -> float:
    """Σσᵢ² of the first r singular values over that of all: what rank r has of ‖ΔW‖² at best; 1 where ΔW = 0."""
    squares = np.square(values)
    return float(squares[:rank].sum() / squares.sum()) if squares.sum() else 1.0


@dataclass(frozen=True)
class Plane:
    """W and ΔW as 2 × 2 matrices; `values`: all singular values of the ΔW that they are a part of."""

    name: str
    weight: Matrix
    change: Matrix
    values: tuple[float, ...]

    @classmethod
    def of(cls, name: str, weight: Matrix, change: Matrix) -> "Plane":
        """Of a ΔW of any size: inputs along its first two right singular vectors, outputs along its first two left.

        There ΔW is diag(σ₁, σ₂). Each pair of vectors has the sign with which the left one's largest entry is positive.
        """
        u, s, vt = np.linalg.svd(change, full_matrices=False)
        signs = np.sign(u[np.abs(u).argmax(axis=0), np.arange(len(s))])
        u, vt = (u * signs)[:, :2], (vt * signs[:, None])[:2]
        return cls(name, u.T @ weight @ vt.T, np.diag(s[:2]), tuple(map(float, s)))

    @classmethod
    def example(cls, name: str, weight: Sequence[float], change: Sequence[float]) -> "Plane":
        """From numbers row by row."""
        w, d = (np.array(numbers, dtype=np.float64).reshape(2, 2) for numbers in (weight, change))
        return cls(name, w, d, tuple(map(float, np.linalg.svd(d, compute_uv=False))))

    @property
    def update(self) -> Matrix:
        """BA: the best of rank 1."""
        return best_of_rank(self.change, 1)

    @property
    def pair(self) -> tuple[float, float]:
        """The two largest singular values."""
        return self.values[0], self.values[1]

    @property
    def ratio(self) -> float:
        """σ₂/σ₁: how far the two ellipses are from each other at most, where 1 is as far as training moved a point."""
        first, second = self.pair
        return second / first if first else 0.0


def circle(points: int) -> Matrix:
    """(2, points): unit vectors, the first again as the last."""
    angles = np.linspace(0, 2 * np.pi, points)
    return np.stack((np.cos(angles), np.sin(angles)))


def farthest(plane: Plane) -> tuple[Matrix, Matrix]:
    """Where (W + ΔW)x and (W + BA)x are farthest from each other for |x| = 1: x is v₂, the distance σ₂."""
    x = np.linalg.svd(plane.change)[2][1]
    return (plane.weight + plane.change) @ x, (plane.weight + plane.update) @ x
