"""What a merge does to a tensor: five edits, each of a block of rows.

Rows are independent in every edit but DoRA's on a transposed weight, so a block of them can be
read, folded and written alone.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.adapters.lora import LEAST
from pipeline.adapters.low_rank import squared_norm
from pipeline.weights.blocks import Rows

# rows of a tensor → the same rows of the merged tensor, in the same dtype
Edit = Callable[[Tensor, slice], Tensor]


@dataclass(frozen=True)
class Update:
    """An edit by s·left·right, for left (n, R) and right (R, m)."""

    left: Tensor
    right: Tensor
    scale: float

    def __call__(self, weight: Tensor, rows: slice) -> Tensor:
        raise NotImplementedError

    @torch.no_grad()
    def updated(self, weight: Tensor, rows: slice) -> Tensor:
        """weight + s·left·right over `rows`, in fp32 or wider."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        left, right = self.left[rows].to(wide), self.right.to(wide)
        result: Tensor = weight.to(wide, copy=True).addmm_(left, right, alpha=self.scale)
        return result

    def dot_products(self, old: Tensor, new: Tensor, rows: slice) -> tuple[float, float]:
        """⟨new − old, update⟩ and ⟨update, update⟩ over `rows`."""
        update = self(old, rows) - old
        return float(((new - old) * update).sum()), float(update.square().sum())

    def with_norms(self, _blocks: Iterable[Rows]) -> "Update":
        """Itself, with norms of the whole matrix if it needs them; the blocks must cover W."""
        return self


@dataclass(frozen=True)
class AddLowRank(Update):
    """W + s·left·right, summed in fp32 and rounded once."""

    def __call__(self, weight: Tensor, rows: slice) -> Tensor:
        return self.updated(weight, rows).to(weight.dtype)

    def dot_products(self, old: Tensor, new: Tensor, rows: slice) -> tuple[float, float]:
        """The update is never materialized."""
        left = self.left[rows]
        products = ((new - old) @ self.right.float().T) * left.float()  # (rows, R)
        return self.scale * float(products.sum()), squared_norm(left, self.right, self.scale)


@dataclass(frozen=True)
class AddToExperts(Update):
    """Wₑ + s·leftₑ·rightₑ for stacked W (E, n, m), left (E, n, R) and right (E, R, m).

    A row of the tensor is all of one expert, (n·m).
    """

    def of(self, expert: int, rows: slice = slice(None)) -> AddLowRank:
        """The edit of some rows of one expert's own matrix."""
        return AddLowRank(self.left[expert, rows], self.right[expert], self.scale)

    def _by_expert(
        self, rows: slice, *stacked: Tensor
    ) -> Iterator[tuple[AddLowRank, list[Tensor]]]:
        shape = self.left.shape[1], self.right.shape[2]
        for place, expert in enumerate(range(rows.start, rows.stop)):
            yield self.of(expert), [weight[place].view(shape) for weight in stacked]

    def __call__(self, weight: Tensor, rows: slice) -> Tensor:
        merged = [edit(w, slice(None)) for edit, (w,) in self._by_expert(rows, weight)]
        return torch.stack(merged).flatten(1)

    def dot_products(self, old: Tensor, new: Tensor, rows: slice) -> tuple[float, float]:
        dot = size = 0.0
        for edit, (before, after) in self._by_expert(rows, old, new):
            of_expert = edit.dot_products(before, after, slice(None))
            dot, size = dot + of_expert[0], size + of_expert[1]
        return dot, size


@dataclass(frozen=True)
class RescaleRows(Update):
    """DoRA: m/‖V‖·V for V = W + s·left·right, with magnitude m (O,) per output.

    An output's weights are a row of W, or a column if `transposed` (Conv1D); column norms need all
    rows of W first.
    """

    magnitude: Tensor
    transposed: bool = False
    norms: Tensor | None = None  # ‖V‖ of every column

    def with_norms(self, blocks: Iterable[Rows]) -> "RescaleRows":
        if not self.transposed:
            return self
        squares = torch.zeros_like(self.magnitude)
        for rows, block in blocks:
            squares += self.updated(block, rows).square().sum(0)
        return replace(self, norms=squares.sqrt().clamp_(min=LEAST))

    def __call__(self, weight: Tensor, rows: slice) -> Tensor:
        result = self.updated(weight, rows)
        if self.norms is not None:
            return (result * (self.magnitude / self.norms)).to(weight.dtype)
        norms = torch.linalg.vector_norm(result, dim=1).clamp_(min=LEAST)
        ratio: Tensor = self.magnitude[rows] / norms
        return (result * ratio[:, None]).to(weight.dtype)


@dataclass(frozen=True)
class SetRows:
    """Sets the rows `ids` (n,) to `values` (n, m)."""

    ids: Tensor
    values: Tensor

    def __call__(self, weight: Tensor, rows: slice) -> Tensor:
        here = (self.ids >= rows.start) & (self.ids < rows.stop)
        return weight.index_copy(0, self.ids[here] - rows.start, self.values[here].to(weight.dtype))


@dataclass(frozen=True)
class Replace:
    """Replaces the tensor by another of the same shape."""

    values: Tensor

    def __call__(self, weight: Tensor, rows: slice) -> Tensor:
        return self.values[rows].reshape(weight.shape).to(weight.dtype)


def same_edit(one: Edit | None, other: Edit | None) -> bool:
    """Whether two edits have the same effect."""
    if one is None or type(one) is not type(other):
        return one is other
    for mine, theirs in zip(vars(one).values(), vars(other).values(), strict=True):
        tensors = isinstance(mine, Tensor) and isinstance(theirs, Tensor)
        if not (torch.equal(mine, theirs) if tensors else mine == theirs):
            return False
    return True
