"""Train big, compress after: an adapter whose updates are replaced by their best approximations of
lower rank.
"""

import math
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

from torch import Tensor

from pipeline.adapters.low_rank import LowRank, load_update, svd, truncated
from pipeline.errors import UserError
from pipeline.files.base_model import tensor_locations
from pipeline.models.load import skeleton
from pipeline.weights.import_adapter import refuse_other, write_changed
from pipeline.weights.merge_plan import attach_to_meta_model


@dataclass(frozen=True)
class Limit:
    """How far to compress: each update to at most `rank`, or to the lowest rank that holds `energy`
    of ‖s·BA‖².
    """

    rank: int | None = None
    energy: float | None = None

    def rank_of(self, values: Tensor) -> int:
        """The rank at which an update with these singular values, largest first, is cut; at least
        1.
        """
        if self.energy is None:
            return min(self.rank or 1, len(values))
        squares = values.square().tolist()
        # less what rounding may take from the sum
        enough = self.energy * math.fsum(squares) * (1 - 1e-12)
        return next(
            (rank for rank, held in enumerate(accumulate(squares), start=1) if held >= enough),
            len(values),
        )


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
    """Write `source` at a lower rank to `out`, all that is not low-rank unchanged; returns what
    each module lost.

    Raises UserError for an adapter that does not fit `base` or has no low-rank update.
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
    params = {
        key: value
        for key, value in (("limit", limit.rank), ("energy", limit.energy))
        if value is not None
    }
    write_changed(
        source, replace(change, low_rank=low_rank), base, out, "compress", __name__, params
    )
    return [row for _, row in pairs]


def total_error(rows: list[Compressed]) -> float:
    """‖ΔW − ΔW′‖ / ‖ΔW‖ over all modules together."""
    size, cut = (math.fsum(getattr(row, part) ** 2 for row in rows) for part in ("size", "cut"))
    return math.sqrt(cut / size) if size else 0.0
