"""Singular values of a matrix M (O, I) that is read some rows at a time: it need not fit into memory.

Up to `WHOLE` columns all of them, from MᵀM (I, I), added up in fp64: what is below 1e-8 of the largest is lost to
rounding. Of wider matrices the largest, from a random subspace that MᵀM is applied to again and again (Halko,
Martinsson and Tropp 2011, §4.5); how far off they may be is measured.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

Rows = tuple[slice, Tensor]
Read = Callable[[], Iterator[Rows]]  # the matrix from its first rows to its last, as often as it is asked for

WHOLE = 1024  # columns
SPARE = 32  # directions of the subspace beyond those that are wanted
PASSES = 6  # over a wide matrix


class Singular(NamedTuple):
    """Singular values (k,), largest first, and their right vectors (I, k).

    `error`: each value is at most so much away from one of M's, as a share of the first; 0 where all are known.
    """

    values: Tensor
    right: Tensor
    error: float

    @property
    def whole(self) -> bool:
        """Whether these are all of M's."""
        return self.right.shape[0] == self.right.shape[1]


@torch.no_grad()
def singular(read: Read, columns: int, most: int) -> Singular:
    """All singular values of a matrix of up to `WHOLE` columns; of others the `most` largest.

    With orthonormal V, eigenvalues of VᵀMᵀMV are squares of values that M has (V square) or nearly has, never more.
    """
    whole = columns <= WHOLE
    basis = torch.eye(columns, dtype=torch.float64) if whole else _random(columns, min(columns, most + SPARE))
    image = gram_times(read, basis)
    for _ in range(0 if whole else PASSES - 1):
        basis = torch.linalg.qr(image).Q
        image = gram_times(read, basis)
    squares, turn = torch.linalg.eigh(basis.T @ image)  # ascending
    squares, turn = squares.flip(0).clamp(min=0), turn.flip(1)
    if not whole:
        squares, turn = squares[:most], turn[:, :most]
    values, right = squares.sqrt(), basis @ turn
    return Singular(values, right, 0.0 if whole else _residual(image @ turn, right, values))


def _random(columns: int, count: int) -> Tensor:
    """(columns, count), orthonormal, the same each time."""
    drawn = torch.randn(columns, count, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found: Tensor = torch.linalg.qr(drawn).Q
    return found


def gram_times(read: Read, basis: Tensor) -> Tensor:
    """MᵀMV for V (I, n), in fp64."""
    found = torch.zeros_like(basis)
    for _, block in read():
        wide = block.double()
        found += wide.T @ (wide @ basis)
    return found


def _residual(image: Tensor, right: Tensor, values: Tensor) -> float:
    """The largest ‖Mᵀu − σv‖ / σ₁ for u = Mv/σ: M has a singular value no further from σ (Parlett 1998, §4.5)."""
    far = torch.linalg.vector_norm(image - right * values.square(), dim=0)  # σ times that
    own = (far / values.clamp(min=1e-300)).clamp(max=float(values[0]))
    return float(own.max() / values[0]) if values[0] else 0.0


@torch.no_grad()
def factors(read: Read, rows: int, found: Singular, rank: int) -> tuple[Tensor, Tensor]:
    """B (O, R) and A (R, I) whose product is nearest to M (Eckart and Young 1936): U√S and √SVᵀ, in fp32."""
    right = found.right[:, :rank]  # (I, R)
    left = torch.empty(rows, right.shape[1], dtype=torch.float64)
    for part, block in read():
        left[part] = block.double() @ right  # US
    root = torch.linalg.vector_norm(left, dim=0).sqrt()
    return (left / root.clamp(min=1e-150)).float(), (root[:, None] * right.T).float()
