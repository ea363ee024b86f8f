"""Collectives between the ranks of a run. In a single process they return their input unchanged.

CPU tensors go over gloo, GPU tensors over NCCL. A rank that dies makes the next collective fail on the others.
"""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.errors import UserError
from pipeline.models.base import CausalLM, LowBitLinear
from pipeline.models.device import free_bytes, model_bytes

Item = TypeVar("Item")


class CollectiveError(UserError):
    """An error raised on every rank and reported by rank 0 only."""


class ProcessLost(CollectiveError):
    """Another process of the run has ended."""

    @classmethod
    def during(cls, stage: str, checkpoint_note: str = "") -> "ProcessLost":
        return cls(f"{stage}: another process of this run ended. {checkpoint_note}Run the same command to resume.")


class WorkerFinished(Exception):
    """Raised on ranks > 0 after the last step; rank 0 writes the artifact."""


def is_main_process() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def shard_for_rank(items: Sequence[Item]) -> list[Item]:
    """Every world_size-th item, starting with this rank."""
    return list(items[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else items)


def all_reduce_numbers(*numbers: float) -> list[float]:
    """Each number's sum over all ranks."""
    if not dist.is_initialized():
        return list(numbers)
    total = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(total)
    return [float(number) for number in total]


def all_reduce_(tensor: Tensor) -> None:
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


def broadcast_(tensor: Tensor) -> None:
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
    for module in (*model.blocks, model.body):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=replicated)
