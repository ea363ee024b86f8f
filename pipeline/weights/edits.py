"""What a merge does to one stored tensor, some rows at a time."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from pipeline.adapters.dora import LEAST
from pipeline.adapters.low_rank import squared_norm

BLOCK = 2**18  # numbers of W that are alive in fp32 at once: they stay in a core's cache


def blocks(rows: int, columns: int, most: int | None = None) -> Iterator[slice]:
    """Slices of rows that cover a matrix; or `most` to twice as many of them, spread over it."""
    size = max(1, BLOCK // max(1, columns))
    every = max(1, -(-rows // size) // most) if most else 1
    return (slice(start, min(start + size, rows)) for start in range(0, rows, size * every))


def merged_rows(weight: Tensor, b: Tensor, a: Tensor, scale: float) -> Tensor:
    """weight (n, I) + s·b·a for b (n, R) and a (R, I): summed in fp32 and rounded once, to the weight's precision."""
    return _summed(weight, b, a, scale).to(weight.dtype)


@torch.no_grad()
def _summed(weight: Tensor, b: Tensor, a: Tensor, scale: float) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    found: Tensor = weight.to(wide, copy=True).addmm_(b.to(wide), a.to(wide), alpha=scale)
    return found


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

    def against(self, old: Tensor, new: Tensor, rows: slice) -> tuple[float, float]:
        """⟨new − old, update⟩ and ⟨update, update⟩ for update = s·left·right, over those rows, without its product."""
        along = ((new - old) @ self.right.float().T) * self.left[rows].float()
        return self.scale * float(along.sum()), squared_norm(self.left[rows], self.right, self.scale)

    def measured(self, _blocks: Iterable[tuple[slice, Tensor]]) -> "AddLowRank":
        return self

    def parts(self) -> tuple[Tensor | float, ...]:
        return self.left, self.right, self.scale


@dataclass(frozen=True)
class RescaleRows:
    """m/‖V‖·V for V = W + s·left·right: an output's weights get the length m (O,).

    They are a row, or a column of a matrix that is `turned`, which has to be measured as a whole before.
    """

    left: Tensor
    right: Tensor
    scale: float
    magnitude: Tensor
    turned: bool = False
    lengths: Tensor | None = None

    def measured(self, blocks: Iterable[tuple[slice, Tensor]]) -> "RescaleRows":
        """With ‖V‖ of every column, from all of the blocks that make up W."""
        if not self.turned:
            return self
        squares = torch.zeros_like(self.magnitude)
        for rows, block in blocks:
            squares += self._sum(block, rows).square().sum(0)
        return replace(self, lengths=squares.sqrt().clamp_(min=LEAST))

    def __call__(self, weight: Tensor, rows: slice) -> Tensor:
        found = self._sum(weight, rows)
        if self.lengths is not None:
            return (found * (self.magnitude / self.lengths)).to(weight.dtype)
        ratio: Tensor = self.magnitude[rows] / torch.linalg.vector_norm(found, dim=1).clamp_(min=LEAST)
        return (found * ratio[:, None]).to(weight.dtype)

    def _sum(self, weight: Tensor, rows: slice) -> Tensor:
        return _summed(weight, self.left[rows], self.right, self.scale)

    def against(self, old: Tensor, new: Tensor, rows: slice) -> tuple[float, float]:
        """⟨new − old, update⟩ and ⟨update, update⟩ over those rows."""
        update = self(old, rows) - old
        return float(((new - old) * update).sum()), float(update.square().sum())

    def parts(self) -> tuple[Tensor | float, ...]:
        return self.left, self.right, self.scale, self.magnitude


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
