"""A distributed run: every rank trains on its share of each batch; rank 0 uses the cache and writes the artifact.

In a single process the collectives return their input unchanged. CPU tensors go over gloo, GPU tensors over NCCL. A
rank that dies makes the next collective fail on the others.
"""

import shutil
import signal
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.errors import Interrupted, UserError
from pipeline.models.base import CausalLM, LowBitLinear
from pipeline.models.device import free_bytes, model_bytes
from pipeline.project.process_rank import world
from pipeline.project.runner import Event, Facts, Job, Work, run
from pipeline.project.stage_graph import Project, Stage

Item = TypeVar("Item")
PATIENCE = timedelta(days=7)  # rank 0 may wait for another run's lock; a rank that died is noticed at once


class CollectiveError(UserError):
    """An error raised on every rank and reported by rank 0 only."""


class ProcessLost(CollectiveError):
    """Another process of the run has ended."""

    @classmethod
    def during(cls, stage: str, checkpoint_note: str = "") -> "ProcessLost":
        return cls(f"{stage}: another process of this run ended. {checkpoint_note}Run the same command to resume.")


def rank() -> int:
    """This process's number, 0 in a single one."""
    return dist.get_rank() if dist.is_initialized() else 0


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
    dist.all_reduce(total)
    return [float(number) for number in total]


def all_reduce(tensor: Tensor) -> None:
    """Sum a tensor over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)


def all_reduce_max(number: int) -> int:
    """The maximum over all ranks."""
    if not dist.is_initialized():
        return number
    maximum = torch.tensor(number)
    dist.all_reduce(maximum, dist.ReduceOp.MAX)
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


def is_lost(error: Exception) -> bool:
    """Whether a collective failed because another rank, or the connection to it, is gone."""
    return dist.is_initialized() and any(name in str(error).lower() for name in ("gloo", "nccl", "connection"))


def needs_shards(model: CausalLM, device: torch.device) -> bool:
    """Whether the weights exceed the free memory of this rank's device or of any other rank's."""
    return dist.is_initialized() and bool(all_reduce_max(int(model_bytes(model) > free_bytes(device))))


def is_sharded(model: CausalLM) -> bool:
    """Whether `shard` has: such a model runs on all ranks at once or not at all."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model.body, FSDPModule)


def shard(model: CausalLM, device: torch.device) -> None:
    """Shard the blocks' frozen weights over the ranks; a block's weights are gathered when it runs (FSDP2).

    Trainable parameters, embeddings and head are replicated. Raises UserError.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if any(isinstance(module, LowBitLinear) for module in model.modules()):
        raise UserError(
            "--shard does not work with a quantized base: every rank keeps all of it. Train without --shard."
        )
    if not model.supports_packing:
        raise UserError(
            "--shard does not work with this model: it does not support packing, so ranks would run its blocks a "
            "different number of times. Train without it."
        )
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    in_blocks = {id(p) for p in model.blocks.parameters()}
    replicated = {p for p in model.parameters() if p.requires_grad or id(p) not in in_blocks}
    for module in (*model.blocks, model.body):  # the blocks first: the body then shards what is left
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=replicated)


def run_distributed(
    project: Project, stage: Stage, work: Work, *, force: bool = False, checkpoint_every: int | None = None
) -> Generator[Event, None, Facts]:
    """`run` on every rank; returns the manifest on rank 0 and {} on the others."""
    with _process_group():
        if not is_main_process():
            with suppress(UserError, Interrupted):  # rank 0 reports it
                _run_as_worker(project, stage, work, checkpoint_every)
            return {}
        started = False

        def lead(job: Job) -> Generator[Event, None, Facts]:
            nonlocal started
            started = True
            broadcast_object(job.key)
            return (yield from _report_errors(work, job))

        try:
            return (yield from run(project, stage, lead, force=force, checkpoint_every=checkpoint_every))
        except ProcessLost:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # sent by torchrun; this rank still has to report the error
            raise
        finally:
            if not started:  # the artifact came from the cache: the other ranks wait for a key
                broadcast_object("")


def _run_as_worker(project: Project, stage: Stage, work: Work, checkpoint_every: int | None) -> None:
    """Do the same work as rank 0, in a folder that is deleted; nothing if rank 0 takes the result from the cache."""
    scratch = project.run_folder(stage.name) / f".rank-{dist.get_rank()}"
    try:
        if key := broadcast_object(""):  # empty: the artifact came from the cache
            shutil.rmtree(scratch, ignore_errors=True)  # left by a killed run
            (scratch / "out").mkdir(parents=True)
            for _ in _report_errors(work, Job(project, stage, scratch / "out", scratch, key, checkpoint_every)):
                pass
    except RuntimeError as error:
        if not is_lost(error):
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _report_errors(work: Work, job: Job) -> Generator[Event, None, Facts]:
    """The work; an error of this rank alone is raised on all ranks."""
    try:
        return (yield from work(job))
    except CollectiveError:
        raise
    except UserError as error:
        with suppress(RuntimeError):  # the other ranks have already exited
            raise_on_all_ranks(str(error))
        raise
    except RuntimeError as error:
        if not is_lost(error):
            raise
        raise ProcessLost.during(job.stage.name) from None


@contextmanager
def _process_group() -> Iterator[None]:
    rank = world()
    if torch.cuda.is_available():
        if rank.local_world_size > torch.cuda.device_count():
            raise UserError(
                f"{rank.local_world_size} processes need as many GPUs, got {torch.cuda.device_count()}. Start fewer."
            )
        torch.cuda.set_device(rank.local_rank)
    # both on a GPU: numbers and messages travel as CPU tensors
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()
