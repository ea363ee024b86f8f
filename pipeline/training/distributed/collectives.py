"""What the processes of one run tell each other. Alone, every function here gives back what it got.

It goes over gloo, gradients on GPUs over NCCL: a process that dies is noticed at the next step.
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
    """Every process of the run raises it; the first says it."""


class ProcessLost(CollectiveError):
    """Another process of the run is gone."""

    @classmethod
    def during(cls, stage: str, kept: str = "") -> "ProcessLost":
        return cls(f"{stage}: another process of this run ended. {kept}Run the same command to go on.")


class WorkerFinished(Exception):
    """This process has done its part: what remains is writing, which the first does."""


def is_main_process() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def shard_for_rank(items: Sequence[Item]) -> list[Item]:
    """This process's share of what makes a step."""
    return list(items[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else items)


def all_reduce_numbers(*numbers: float) -> list[float]:
    """Each number's sum over all processes."""
    if not dist.is_initialized():
        return list(numbers)
    total = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(total)
    return [float(number) for number in total]


def all_reduce_(tensor: Tensor) -> None:
    """The same of a tensor, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)


def all_reduce_max(number: int) -> int:
    """Of all processes' numbers."""
    if not dist.is_initialized():
        return number
    found = torch.tensor(number)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def broadcast_object(thing: Item) -> Item:
    """What the first process has, a few words or numbers; what the others have is dropped."""
    if not dist.is_initialized():
        return thing
    box = [thing if is_main_process() else None]
    dist.broadcast_object_list(box, src=0)
    return box[0]  # type: ignore[return-value]


def broadcast_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The first process's tensors, by name."""
    if not dist.is_initialized():
        return dict(tensors)
    layout = broadcast_object([(name, tuple(t.shape), t.dtype) for name, t in tensors.items()])
    found = (
        dict(tensors) if is_main_process() else {name: torch.empty(shape, dtype=dtype) for name, shape, dtype in layout}
    )
    for tensor in found.values():
        dist.broadcast(tensor, src=0)
    return found


def broadcast_(tensor: Tensor) -> None:
    """Give every process the first one's numbers, in place."""
    if dist.is_initialized():
        dist.broadcast(tensor, src=0)


def raise_on_all_ranks(problem: str = "") -> None:
    """Raises Agreed, in every process, if any of them has a problem. Each must call it."""
    if not dist.is_initialized():
        return
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    for found in filter(None, problems):
        raise CollectiveError(found)


def is_lost(error: Exception) -> bool:
    """Whether a process of the run is gone, or the way to it."""
    return dist.is_initialized() and any(name in str(error).lower() for name in ("gloo", "nccl", "connection"))


def needs_shards(model: CausalLM, device: torch.device) -> bool:
    """Whether the weights take more than this device, or another process's, has free."""
    return dist.is_initialized() and bool(all_reduce_max(int(model_bytes(model) > free_bytes(device))))


def shard(model: CausalLM, device: torch.device) -> None:
    """Each process keeps 1/N of the blocks' frozen weights and fetches a block's others when it runs (FSDP2).

    What trains, and embeddings and head, stay whole in each. Raises UserError.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if any(isinstance(module, LowBitLinear) for module in model.modules()):
        raise UserError("A base in few bits is kept whole on each device. Train without --shard.")
    if not model.supports_packing:
        raise UserError(
            "This model reads one sequence at a time: processes would run its blocks unequally often. Train without "
            "--shard."
        )
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    inside = {id(p) for p in model.blocks.parameters()}
    whole = {p for p in model.parameters() if p.requires_grad or id(p) not in inside}
    for part in (*model.blocks, model.body):
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
