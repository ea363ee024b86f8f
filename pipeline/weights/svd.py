"""Singular values of a matrix M (O, I) that is read a block of rows at a time and need not fit in memory.

Up to `FULL_COLUMNS` columns all of them, from MᵀM (I, I) in fp64: values below 1e-8 of the largest are lost to
rounding. For wider matrices the largest, by subspace iteration with MᵀM on a random start (Halko, Martinsson and Tropp
2011, §4.5), with a measured error bound.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

Rows = tuple[slice, Tensor]
Read = Callable[[], Iterator[Rows]]  # each call reads the matrix once, first row to last

FULL_COLUMNS = 1024  # columns
EXTRA = 32  # dimensions of the random subspace beyond those wanted (oversampling)
PASSES = 6  # reads of a wide matrix


class Singular(NamedTuple):
    """Singular values (k,), largest first, and their right vectors (I, k).

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
    """All singular values of a matrix of up to `FULL_COLUMNS` columns, the `count` largest of a wider one.

    For orthonormal V, the eigenvalues of VᵀMᵀMV are σ² of M if V is square, and lower bounds of them otherwise.
    """
    complete = columns <= FULL_COLUMNS
    basis = torch.eye(columns, dtype=torch.float64) if complete else _random_basis(columns, min(columns, count + EXTRA))
    image = gram_times(read, basis)
    for _ in range(0 if complete else PASSES - 1):
        basis = torch.linalg.qr(image).Q
        image = gram_times(read, basis)
    squares, rotation = torch.linalg.eigh(basis.T @ image)  # ascending
    squares, rotation = squares.flip(0).clamp(min=0), rotation.flip(1)
    if not complete:
        squares, rotation = squares[:count], rotation[:, :count]
    values, right = squares.sqrt(), basis @ rotation
    return Singular(values, right, 0.0 if complete else _residual(image @ rotation, right, values))


def _random_basis(columns: int, count: int) -> Tensor:
    """(columns, count), orthonormal, always from the same seed."""
    drawn = torch.randn(columns, count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    result: Tensor = torch.linalg.qr(drawn).Q
    return result


def gram_times(read: Read, basis: Tensor) -> Tensor:
    """MᵀMV for V (I, n), in fp64."""
    product = torch.zeros_like(basis)
    for _, block in read():
        wide = block.double()
        product += wide.T @ (wide @ basis)
    return product


def _residual(image: Tensor, right: Tensor, values: Tensor) -> float:
    """The largest ‖Mᵀu − σv‖ / σ₁ for u = Mv/σ: M has a singular value no further from σ (Parlett 1998, §4.5)."""
    scaled = torch.linalg.vector_norm(image - right * values.square(), dim=0)  # σ·‖Mᵀu − σv‖
    residuals = (scaled / values.clamp(min=1e-300)).clamp(max=float(values[0]))
    return float(residuals.max() / values[0]) if values[0] else 0.0


@torch.no_grad()
def factors(read: Read, rows: int, svd: Singular, rank: int) -> tuple[Tensor, Tensor]:
    """B (O, R) and A (R, I) whose product is nearest to M (Eckart and Young 1936): U√S and √SVᵀ, in fp32."""
    right = svd.right[:, :rank]  # (I, R)
    left = torch.empty(rows, right.shape[1], dtype=torch.float64)
    for part, block in read():
        left[part] = block.double() @ right  # US
    root = torch.linalg.vector_norm(left, dim=0).sqrt()
    return (left / root.clamp(min=1e-150)).float(), (root[:, None] * right.T).float()
