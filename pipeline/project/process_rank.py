"""Which of several processes this is, as torchrun tells each by its environment; one alone without it."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class ProcessRank:
    """`rank` of `size` processes in all; `local_rank` of `local_size` on this machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @property
    def first(self) -> bool:
        """The one that writes and speaks."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.size == 1


def world() -> ProcessRank:
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return ProcessRank(
        rank, size, int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size))
    )
