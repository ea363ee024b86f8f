"""The changes that a merge makes to a stored tensor, a block of rows at a time."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from pipeline.adapters.lora import LEAST
from pipeline.adapters.low_rank import squared_norm

BLOCK = 2**18  # values of W in memory as fp32 at once: fits in a core's cache


def blocks(rows: int, columns: int, samples: int | None = None) -> Iterator[slice]:
    """Slices of rows that cover a matrix, or `samples` to 2·`samples` of them, evenly spread."""
    size = max(1, BLOCK // max(1, columns))
    step = max(1, -(-rows // size) // samples) if samples else 1
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size * step))


def merged_rows(weight: Tensor, b: Tensor, a: Tensor, scale: float) -> Tensor:
    """weight (n, I) + s·b·a for b (n, R) and a (R, I), summed in fp32 and rounded once to the weight's dtype."""
    return _add_low_rank(weight, b, a, scale).to(weight.dtype)


@torch.no_grad()
def _add_low_rank(weight: Tensor, b: Tensor, a: Tensor, scale: float) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    result: Tensor = weight.to(wide, copy=True).addmm_(b.to(wide), a.to(wide), alpha=scale)
    return result


class Edit(Protocol):
    """Rows of a tensor → the same rows of the merged tensor, in the same dtype."""

    def __call__(self, weight: Tensor, rows: slice) -> Tensor: ...

    def parts(self) -> tuple[Tensor | float, ...]:
        """Its tensors and numbers: two edits with equal parts are equal."""


@dataclass(frozen=True)
class AddLowRank:
    """W + s·left·right, for left (n, R) and right (R, m)."""

    left: Tensor
    right: Tensor
    scale: float

    def __call__(self, weight: Tensor, rows: slice) -> Tensor:
        return merged_rows(weight, self.left[rows], self.right, self.scale)

    def dot_products(self, old: Tensor, new: Tensor, rows: slice) -> tuple[float, float]:
        """⟨new − old, update⟩ and ⟨update, update⟩ over `rows`, for update = s·left·right, never materialized."""
        products = ((new - old) @ self.right.float().T) * self.left[rows].float()  # (rows, R)
        return self.scale * float(products.sum()), squared_norm(self.left[rows], self.right, self.scale)

    def with_norms(self, _blocks: Iterable[tuple[slice, Tensor]]) -> "AddLowRank":
        return self

    def parts(self) -> tuple[Tensor | float, ...]:
        return self.left, self.right, self.scale


@dataclass(frozen=True)
class RescaleRows:
    """DoRA: m/‖V‖·V for V = W + s·left·right, with magnitude m (O,) per output.

    An output's weights are a row of W, or a column if `transposed` (Conv1D); column norms need all rows of W first.
    """

    left: Tensor
    right: Tensor
    scale: float
    magnitude: Tensor
    transposed: bool = False
    norms: Tensor | None = None

    def with_norms(self, blocks: Iterable[tuple[slice, Tensor]]) -> "RescaleRows":
        """Itself, with ‖V‖ of every column if they are needed; `blocks` must cover W."""
        if not self.transposed:
            return self
        squares = torch.zeros_like(self.magnitude)
        for rows, block in blocks:
            squares += self._updated(block, rows).square().sum(0)
        return replace(self, norms=squares.sqrt().clamp_(min=LEAST))

    def __call__(self, weight: Tensor, rows: slice) -> Tensor:
        result = self._updated(weight, rows)
        if self.norms is not None:
            return (result * (self.magnitude / self.norms)).to(weight.dtype)
        ratio: Tensor = self.magnitude[rows] / torch.linalg.vector_norm(result, dim=1).clamp_(min=LEAST)
        return (result * ratio[:, None]).to(weight.dtype)

    def _updated(self, weight: Tensor, rows: slice) -> Tensor:
        return _add_low_rank(weight, self.left[rows], self.right, self.scale)

    def dot_products(self, old: Tensor, new: Tensor, rows: slice) -> tuple[float, float]:
        """⟨new − old, update⟩ and ⟨update, update⟩ over `rows`."""
        update = self(old, rows) - old
        return float(((new - old) * update).sum()), float(update.square().sum())

    def parts(self) -> tuple[Tensor | float, ...]:
        return self.left, self.right, self.scale, self.magnitude


@dataclass(frozen=True)
class SetRows:
    """Sets the rows `ids` (n,) to `values` (n, m)."""

    ids: Tensor
    values: Tensor

    def __call__(self, weight: Tensor, rows: slice) -> Tensor:
        here = (self.ids >= rows.start) & (self.ids < rows.stop)
        return weight.index_copy(0, self.ids[here] - rows.start, self.values[here].to(weight.dtype))

    def parts(self) -> tuple[Tensor | float, ...]:
        return self.ids, self.values


@dataclass(frozen=True)
class Replace:
    """Replaces the tensor by another of the same shape."""

    values: Tensor

    def __call__(self, weight: Tensor, rows: slice) -> Tensor:
        return self.values[rows].reshape(weight.shape).to(weight.dtype)

    def parts(self) -> tuple[Tensor | float, ...]:
        return (self.values,)


def same_edit(one: Edit | None, other: Edit | None) -> bool:
    """Whether two edits have the same effect."""
    if one is None or other is None or type(one) is not type(other):
        return one is other
    pairs = zip(one.parts(), other.parts(), strict=True)
    return all(torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b for a, b in pairs)
