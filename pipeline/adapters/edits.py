"""What a merge does to one stored tensor, some rows at a time."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

BLOCK = 2**18  # numbers of W that are alive in fp32 at once: they stay in a core's cache


def blocks(rows: int, columns: int, most: int | None = None) -> Iterator[slice]:
    """Slices of rows that cover a matrix; or `most` to twice as many of them, spread over it."""
    size = max(1, BLOCK // max(1, columns))
    every = max(1, -(-rows // size) // most) if most else 1
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size * every))


@torch.no_grad()
def merged_rows(weight: Tensor, b: Tensor, a: Tensor, scale: float) -> Tensor:
    """weight (n, I) + s·b·a for b (n, R) and a (R, I): summed in fp32 and rounded once, to the weight's precision."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(wide, copy=True).addmm_(b.to(wide), a.to(wide), alpha=scale).to(weight.dtype)


def squared_norm(b: Tensor, a: Tensor, scale: float) -> float:
    """‖s·BA‖² for B (O, R) and A (R, I), without the (O, I) product: trace of BᵀB·AAᵀ."""
    b, a = b.double(), a.double()
    return scale**2 * float(((b.T @ b) * (a @ a.T)).sum())


class Edit(Protocol):
    """Rows of a tensor → the same rows of the merged one, in the same precision."""

    def __call__(self, weight: Tensor, rows: slice) -> Tensor: ...

    def parts(self) -> tuple[Tensor | float, ...]:
        """All that it is made of: two edits with the same parts do the same."""


@dataclass(frozen=True)
class AddLowRank:
    """W + s·left·right, (n, R) and (R, m)."""

    left: Tensor
    right: Tensor
    scale: float

    def __call__(self, weight: Tensor, rows: slice) -> Tensor:
        return merged_rows(weight, self.left[rows], self.right, self.scale)

    def along(self, change: Tensor, rows: slice) -> float:
        """⟨change, s·left·right⟩ over those rows, without the product of left and right."""
        return self.scale * float(((change @ self.right.float().T) * self.left[rows].float()).sum())

    def size(self, rows: slice) -> float:
        """⟨s·left·right, s·left·right⟩ over those rows."""
        return squared_norm(self.left[rows], self.right, self.scale)

    def parts(self) -> tuple[Tensor | float, ...]:
        return self.left, self.right, self.scale


@dataclass(frozen=True)
class SetRows:
    """The rows `ids` (n,) become `values` (n, m)."""

    ids: Tensor
    values: Tensor

    def __call__(self, weight: Tensor, rows: slice) -> Tensor:
        here = (self.ids >= rows.start) & (self.ids < rows.stop)
        return weight.index_copy(0, self.ids[here] - rows.start, self.values[here].to(weight.dtype))

    def parts(self) -> tuple[Tensor | float, ...]:
        return self.ids, self.values


@dataclass(frozen=True)
class Replace:
    """Another tensor of the same shape."""

    values: Tensor

    def __call__(self, weight: Tensor, rows: slice) -> Tensor:
        return self.values[rows].reshape(weight.shape).to(weight.dtype)

    def parts(self) -> tuple[Tensor | float, ...]:
        return (self.values,)


def same(one: Edit | None, other: Edit | None) -> bool:
    """Whether two edits change equal tensors to equal tensors."""
    if one is None or other is None or type(one) is not type(other):
        return one is other
    pairs = zip(one.parts(), other.parts(), strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b for a, b in pairs)
