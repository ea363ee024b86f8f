"""What the ranks of a run exchange; in a single process, collectives return their input.

CPU tensors go over gloo, GPU tensors over NCCL. A rank that dies makes the next collective fail on
the others; so does a machine that is gone, or the connection to it, which `heartbeats.py` finds.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.errors import Lost, UserError, is_out_of_memory

if TYPE_CHECKING:
    from pipeline.training.parallel.heartbeats import Heartbeats

Item = TypeVar("Item")

# torch's own limit for gloo: a process that lives and does not answer
SLOWEST_STEP = timedelta(minutes=30)
LOOK = timedelta(seconds=1)  # a collective that takes longer looks whether a rank is lost
NAMED_WITHIN = 5  # seconds: gloo notices an end at once, but not whose it is

# Words of gloo and NCCL about a connection, which their messages about mistakes do not have. The
# names of NCCL's errors do not tell: it reports a closed connection as an internal error, too.
_OF_A_COLLECTIVE = re.compile("gloo|nccl|pair closure|collective operation", re.IGNORECASE)
_OF_A_CONNECTION = re.compile(
    "connection (closed|reset|refused)|timed out|timeout|broken pipe|no route to "
    "host|unreachable|ncclRemoteError|communicator was aborted|completion from peer",
    re.IGNORECASE,
)

_heartbeats: "Heartbeats | None" = None  # of this run


class CollectiveError(UserError):
    """An error raised on every rank and reported once on each machine."""


class ProcessLost(CollectiveError, Lost):
    """Another process of the run has ended, or its machine does not answer."""

    @classmethod
    def during(cls, stage: str, checkpoint_note: str = "") -> "ProcessLost":
        lost = _heartbeats.name_lost(NAMED_WITHIN) if _heartbeats else ""
        if not is_main_process():
            checkpoint_note = "Checkpoints are with rank 0. "
        return cls(
            f"{stage}: {lost or 'another process of this run'} ended, or cannot be reached. "
            f"{checkpoint_note}Run the same command to resume."
        )


def rank() -> int:
    """This process's number, 0 in a single one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes of the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_distributed() -> bool:
    """Whether this process is one of a run's several."""
    return dist.is_initialized()


def is_main_process() -> bool:
    return rank() == 0


def shard_for_rank(items: Sequence[Item]) -> list[Item]:
    """Every world_size-th item, starting with this rank."""
    return list(items[rank() :: world_size()])


def all_reduce_numbers(*numbers: float) -> list[float]:
    """Each number's sum over all ranks."""
    if not dist.is_initialized():
        return list(numbers)
    # on the CPU: over gloo, which notices a rank that is gone
    total = torch.tensor(numbers, dtype=torch.float64)
    all_reduce(total)
    return [float(number) for number in total]


def all_reduce(tensor: Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
    """Sum a tensor over all ranks, in place. Raises RuntimeError if a rank is gone."""
    if not dist.is_initialized():
        return
    if tensor.device.type != "cpu":
        dist.all_reduce(tensor, operation)  # only queued
        # costs little: the gradient's norm is read next
        torch.cuda.current_stream(tensor.device).synchronize()
    else:
        # On a busy machine gloo overlooks about one of a thousand ends of another rank. It would
        # wait for SLOWEST_STEP, deaf to signals, and torchrun would end this process before it has
        # written a checkpoint.
        work = dist.all_reduce(tensor, operation, async_op=True)
        while not _ends(work, LOOK):
            _raise_if_lost()
        work.wait()  # raises what failed
    # NCCL was aborted then: this sum, or what was read before it, is not to be used
    _raise_if_lost()


def follow(heartbeats: "Heartbeats | None") -> None:
    """From here on, a rank that they find lost fails the collectives."""
    global _heartbeats
    _heartbeats = heartbeats


def _raise_if_lost() -> None:
    if _heartbeats is not None and _heartbeats.lost:
        raise dist.DistNetworkError(f"{_heartbeats.lost} is lost")


def _ends(work: dist.Work, within: timedelta) -> bool:
    """Wait for a collective; whether it has ended, well or not."""
    with suppress(RuntimeError):
        work.wait(within)
    return work.is_completed()


def all_reduce_max(number: int) -> int:
    """The maximum over all ranks."""
    maximum = torch.tensor(number)
    all_reduce(maximum, dist.ReduceOp.MAX)
    return int(maximum)


def broadcast_object(value: Item) -> Item:
    """Rank 0's object, which must be small and picklable; those of the other ranks are ignored."""
    if not dist.is_initialized():
        return value
    boxed = [value if is_main_process() else None]
    dist.broadcast_object_list(boxed, src=0)
    return boxed[0]  # type: ignore[return-value]


def broadcast_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rank 0's tensors, by name."""
    if not dist.is_initialized():
        return dict(tensors)
    layout = broadcast_object([(name, tuple(t.shape), t.dtype) for name, t in tensors.items()])
    received = dict(tensors)
    if not is_main_process():
        received = {name: torch.empty(shape, dtype=dtype) for name, shape, dtype in layout}
    for tensor in received.values():
        dist.broadcast(tensor, src=0)
    return received


def broadcast(tensor: Tensor) -> None:
    """Copy rank 0's values to every rank, in place."""
    if dist.is_initialized():
        dist.broadcast(tensor, src=0)


def raise_on_all_ranks(problem: str = "") -> None:
    """Raises CollectiveError on every rank if any rank passes a problem. All ranks must call it."""
    if not dist.is_initialized():
        return
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for message in filter(None, problems):
        raise CollectiveError(message)


def limit_waiting(longest: timedelta) -> None:
    """From here on, a collective that waits longer fails."""
    if dist.is_initialized():
        dist.distributed_c10d._set_pg_timeout(longest)


def is_lost(error: Exception) -> bool:
    """Whether a collective failed because another rank, or the connection to it, is gone."""
    if not dist.is_initialized() or is_out_of_memory(error):
        return False
    # what NCCL left when it was aborted can raise anything
    if _heartbeats is not None and _heartbeats.lost:
        return True
    return tells_of_a_connection(error)


def tells_of_a_connection(error: Exception) -> bool:
    """Whether it is an error of gloo, NCCL or the run's store about another rank."""
    if isinstance(error, dist.DistNetworkError | dist.DistStoreError):
        return True
    return bool(_OF_A_COLLECTIVE.search(str(error)) and _OF_A_CONNECTION.search(str(error)))
