"""Rank and world size of this process, from torchrun's environment variables."""

import os
import signal
from typing import NamedTuple


class ProcessRank(NamedTuple):
    """`rank` of `world_size` processes in total; `local_rank` of `local_world_size` on this machine."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int

    @property
    def is_main_process(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    @property
    def reports_errors(self) -> bool:
        """Whether this is the first process on its machine, which tells the user there why a run ends."""
        return self.local_rank == 0


def world() -> ProcessRank:
    """This process's rank; rank 0 of 1 without torchrun."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return ProcessRank(
        rank, size, int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size))
    )


def hangs_up() -> bool:
    """Whether this process ends with its terminal: not under nohup, which ignores SIGHUP."""
    return signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
