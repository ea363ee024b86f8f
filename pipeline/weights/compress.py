"""Train big, compress after: updates become their best approximations of lower rank."""

import math
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from pipeline.adapters.low_rank import LowRank, load_update, svd, truncated
from pipeline.errors import UserError
from pipeline.files.base_model import tensor_locations
from pipeline.models.load import skeleton
from pipeline.weights.import_adapter import refuse_other, write_changed
from pipeline.weights.merge_plan import attach_to_meta_model
from pipeline.weights.spectrum import lowest_rank


@dataclass(frozen=True)
class Limit:
    """How far to compress each update: to a rank, or to a share of ‖s·BA‖²."""

    rank: int | None = None
    energy: float | None = None  # of ‖s·BA‖²: the lowest rank that holds this share

    def rank_of(self, values: Tensor) -> int:
        """The rank, at least 1, to cut an update to; its singular values are largest first."""
        if self.energy is None:
            return min(self.rank or 1, len(values))
        squares = values.square().tolist()
        return lowest_rank(squares, self.energy * math.fsum(squares)) or len(values)


@dataclass(frozen=True)
class Compressed:
    """One module: its rank before and after, ‖s·BA‖, and the norm of what was cut off."""

    module: str
    before: int
    after: int
    size: float
    cut: float

    @property
    def error(self) -> float:
        """‖ΔW − ΔW′‖ / ‖ΔW‖; 0 for an update of zero."""
        return self.cut / self.size if self.size else 0.0


def compress(name: str, update: LowRank, limit: Limit) -> tuple[LowRank, Compressed]:
    """The nearest update within `limit` (Eckart and Young 1936), from the factors only."""
    left, values, right = svd(update)
    rank = limit.rank_of(values)
    cut = truncated(left, values, right, rank, update.embedding)
    size, lost = (math.sqrt(math.fsum(part.square().tolist())) for part in (values, values[rank:]))
    return cut, Compressed(name, update.rank, rank, size, lost)


def compress_adapter(
    source: Path, base: Path, out: Path, limit: Limit, trust_remote_code: bool = False
) -> list[Compressed]:
    """Write `source` at a lower rank to `out`; returns what each module lost.

    All that is not low-rank stays unchanged. Raises UserError for an adapter that does not fit
    `base` or has no low-rank update.
    """
    refuse_other(out, "compress", [source])
    change = load_update(source)
    if not change.low_rank:
        raise UserError(
            f"{source} has no low-rank update: there is nothing to compress. Name an adapter with "
            "LoRA."
        )
    attach_to_meta_model(skeleton(base, trust_remote_code), base, tensor_locations(base), source)
    pairs = [compress(name, update, limit) for name, update in change.low_rank.items()]
    low_rank = {row.module: update for update, row in pairs}
    limits = {"limit": limit.rank, "energy": limit.energy}
    params = {key: value for key, value in limits.items() if value is not None}
    changed = replace(change, low_rank=low_rank)
    write_changed(source, changed, base, out, "compress", __name__, params)
    return [row for _, row in pairs]


def total_error(rows: list[Compressed]) -> float:
    """‖ΔW − ΔW′‖ / ‖ΔW‖ over all modules together."""
    size, cut = math.fsum(row.size**2 for row in rows), math.fsum(row.cut**2 for row in rows)
    return math.sqrt(cut / size) if size else 0.0
