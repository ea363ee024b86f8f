"""One rank of many in this process alone: torch's fake process group, which sends nothing.

It shows what FSDP2 makes of a model at any number of ranks: which rows each keeps, the shapes that
are gathered, and that forward and backward run on them. It shows no numbers: what is gathered is
this rank's own rows, repeated. Numbers are `ranks.py`'s, over gloo; neither shows NCCL or its
streams.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def fake_rank(rank: int, world_size: int = 8) -> Iterator[None]:
    """Inside the block this process is one rank of `world_size`."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
