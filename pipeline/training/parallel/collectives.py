"""What the ranks of a run exchange. In a single process the collectives return their input unchanged.

CPU tensors go over gloo, GPU tensors over NCCL. A rank that dies makes the next collective fail on the others; so does
a machine that is gone, or the connection to it, after LOST_AFTER seconds.
"""

import ctypes
import re
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.errors import UserError, is_out_of_memory

if TYPE_CHECKING:
    import psutil

Item = TypeVar("Item")

# Seconds without an answer from another machine. TCP repeats a packet after 0.2 s, 0.4 s …, so that a connection which
# was cut for half a minute is tried again 51 s after the cut: less than that would end a run that could go on.
LOST_AFTER = 90
KEEPALIVE = {  # names differ by system, and macOS has no TCP_USER_TIMEOUT
    "TCP_KEEPIDLE": LOST_AFTER // 3,
    "TCP_KEEPALIVE": LOST_AFTER // 3,
    "TCP_KEEPINTVL": LOST_AFTER // 9,
    "TCP_KEEPCNT": 6,
    "TCP_USER_TIMEOUT": 1000 * LOST_AFTER,  # of packets that were sent and not answered
}
SLOWEST_STEP = timedelta(minutes=30)  # torch's own limit for gloo: a process that lives and does not answer
LOOK = timedelta(seconds=1)  # a collective that takes longer looks whether the other processes still run

# How gloo and NCCL tell of a connection; of a mistake they say none of it. NCCL's own names of errors do not tell: it
# passes on a closed connection as an internal error, too.
_OF_A_COLLECTIVE = re.compile("gloo|nccl|pair closure|collective operation", re.IGNORECASE)
_OF_A_CONNECTION = re.compile(
    "connection (closed|reset|refused)|timed out|timeout|broken pipe|no route to host|unreachable|ncclRemoteError"
    "|communicator was aborted|completion from peer",
    re.IGNORECASE,
)

_neighbours: "list[psutil.Process]" = []  # the other ranks that this one can see


class CollectiveError(UserError):
    """An error raised on every rank and reported once on each machine."""


class ProcessLost(CollectiveError):
    """Another process of the run has ended, or its machine does not answer."""

    @classmethod
    def during(cls, stage: str, checkpoint_note: str = "") -> "ProcessLost":
        if not is_main_process():
            checkpoint_note = "Checkpoints are with rank 0. "
        return cls(
            f"{stage}: another process of this run ended, or cannot be reached. {checkpoint_note}"
            "Run the same command to resume."
        )


def rank() -> int:
    """This process's number, 0 in a single one."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_distributed() -> bool:
    """Whether this process is one of a run's several."""
    return dist.is_initialized()


def is_main_process() -> bool:
    return rank() == 0


def shard_for_rank(items: Sequence[Item]) -> list[Item]:
    """Every world_size-th item, starting with this rank."""
    return list(items[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else items)


def all_reduce_numbers(*numbers: float) -> list[float]:
    """Each number's sum over all ranks."""
    if not dist.is_initialized():
        return list(numbers)
    total = torch.tensor(numbers, dtype=torch.float64)  # on the CPU: over gloo, which notices a rank that is gone
    all_reduce(total)
    return [float(number) for number in total]


def all_reduce(tensor: Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> None:
    """Sum a tensor over all ranks, in place. Raises RuntimeError if a rank is gone."""
    if not dist.is_initialized():
        return
    if tensor.device.type != "cpu":  # only enqueued
        dist.all_reduce(tensor, operation)
        return
    # On a busy machine gloo overlooks about one of a thousand ends of another rank. It would wait for SLOWEST_STEP,
    # deaf to signals, and torchrun would end this process before it has written a checkpoint.
    work, lost = dist.all_reduce(tensor, operation, async_op=True), False
    while not _ends(work, LOOK):
        if lost:
            # a thread of gloo goes on waiting, and the group's destructor would wait for that thread
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(dist.group.WORLD))
            raise dist.DistNetworkError("gloo did not notice that another rank has ended")
        lost = not all(map(_runs, _neighbours))  # what it has sent may still arrive
    work.wait()  # raises what failed


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
    received = (
        dict(tensors) if is_main_process() else {name: torch.empty(shape, dtype=dtype) for name, shape, dtype in layout}
    )
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


def notice_lost_machines() -> None:
    """Have the kernel end this process's connections LOST_AFTER seconds after the other machine's last answer.

    A connection that was cut looks like one on which nobody sends: gloo would wait for its timeout, which has to allow
    for slow steps. The kernel of a machine answers however busy its processes are. gloo has no option for it.
    """
    for path in Path("/dev/fd").iterdir():
        try:
            connection = socket.socket(fileno=int(path.name))
        except OSError:  # a file
            continue
        if connection.family in (socket.AF_INET, socket.AF_INET6):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in KEEPALIVE.items():
                if option := getattr(socket, name, None):
                    connection.setsockopt(socket.IPPROTO_TCP, option, value)
        connection.detach()  # it stays open


def meet_neighbours() -> None:
    """Look which other ranks this process can see: not those on other machines or in other containers."""
    import psutil  # 20 ms that a run in one process does not pay

    own = psutil.Process()
    started: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(started, (own.pid, own.create_time()))
    _neighbours.clear()
    for pid, time in started:
        with suppress(psutil.Error):
            process = psutil.Process(pid)
            if process != own and process.create_time() == time:
                _neighbours.append(process)


def _runs(process: "psutil.Process") -> bool:
    """Not if it has ended and its parent has not asked for its exit code yet."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def limit_waiting(longest: timedelta) -> None:
    """From here on, a collective that waits longer fails."""
    if dist.is_initialized():
        dist.distributed_c10d._set_pg_timeout(longest)


def is_lost(error: Exception) -> bool:
    """Whether a collective failed because another rank, or the connection to it, is gone."""
    if not dist.is_initialized() or is_out_of_memory(error):
        return False
    if isinstance(error, dist.DistNetworkError | dist.DistStoreError):
        return True
    return bool(_OF_A_COLLECTIVE.search(str(error)) and _OF_A_CONNECTION.search(str(error)))
