"""Frozen weights sharded over the ranks (FSDP2)."""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.files.base_model import TensorLocation
from pipeline.models.base import CausalLM, LowBitLinear
from pipeline.models.device import device_for, free_bytes, model_bytes, placed_for_inference
from pipeline.models.save import read_rows
from pipeline.project.runner import Event, Job
from pipeline.training.parallel.collectives import all_reduce_max

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def needs_shards(model: CausalLM, device: torch.device, predicted_peak: Callable[[], int]) -> bool:
    """Whether the weights, or a step's predicted peak, exceed any rank's free device memory.

    The peak is asked for only where the weights fit, as it may read all of them.
    """
    if not dist.is_initialized():
        return False
    free = free_bytes(device)
    if all_reduce_max(int(model_bytes(model) > free)):
        return True
    exceeds = free < torch.inf and predicted_peak() > free
    # a model without packing cannot be sharded, and may still fit unsharded
    return bool(all_reduce_max(int(exceeds and model.supports_packing)))


def shards_first(job: Job, model: CausalLM) -> bool:
    """Whether the base is sharded before it runs: by --shard, or a rank has no room for it."""
    if job.sharded is None:  # room for a step is not needed yet
        return needs_shards(model, device_for(model), lambda: 0)
    return job.sharded and dist.is_initialized()


def before_training(job: Job, model: CausalLM, computation: Iterator[Event]) -> Iterator[Event]:
    """Run `computation` with the model on its device: now, or in the loop if it is sharded first.

    All ranks must then run the model equally often.
    """
    if shards_first(job, model):
        job.deferred.append(computation)
        return
    with placed_for_inference(model):
        yield from computation


def is_sharded(model: CausalLM) -> bool:
    """Whether `shard` was called: such a model runs on all ranks at once or not at all."""
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model.body, FSDPModule)


def shard(model: CausalLM, device: torch.device) -> None:
    """Shard the blocks' frozen weights over the ranks (FSDP2), and move the model.

    A block's weights are gathered when it runs. Trainable parameters, embeddings and head are
    replicated. This rank's rows of a weight are read from its file, unless the weight was changed:
    a base in its own precision was only mapped into memory so far. Raises UserError.
    """
    from torch.distributed.device_mesh import init_device_mesh

    for module in model.modules():
        if isinstance(module, LowBitLinear):
            _buffers_to_parameters(module)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    in_blocks = {id(p) for p in model.blocks.parameters()}
    # a scalar, such as the mean of doubly quantized scales, has no rows
    replicated = {
        p for p in model.parameters() if p.requires_grad or id(p) not in in_blocks or not p.dim()
    }
    # the blocks first: the body then shards what is left
    for module in (*model.blocks, model.body):
        _shard(module, mesh, replicated, model.stored)
    model.stored.clear()  # it keeps the whole weights
    model.to(device)
    if not model.supports_packing:  # only now: trying it reads every weight
        raise UserError(
            "--shard does not work with this model: it does not support packing, so ranks would "
            "run its blocks a different number of times. Train without it."
        )


def _buffers_to_parameters(module: nn.Module) -> None:
    """Make codes and scales of a quantized linear frozen parameters, which FSDP shards."""
    for name, buffer in list(module.named_buffers(recurse=False)):
        delattr(module, name)
        module.register_parameter(name, nn.Parameter(buffer, requires_grad=False))


@torch.no_grad()
def _shard(
    module: nn.Module,
    mesh: "DeviceMesh",
    replicated: set[nn.Parameter],
    stored: Mapping[Tensor, TensorLocation],
) -> None:
    """`fully_shard` by way of the meta device: no more than this rank's rows are read or moved."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    whole: list[tuple[nn.Module, str, nn.Parameter]] = []
    for part in module.modules():
        for name, p in list(part.named_parameters(recurse=False)):
            if p not in replicated and not isinstance(p, DTensor):
                whole.append((part, name, p))
                setattr(part, name, nn.Parameter(p.to("meta"), requires_grad=False))
    fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=replicated)
    module._apply(  # type: ignore[no-untyped-call]
        lambda t: torch.empty_like(t, device=mesh.device_type) if t.is_meta else t
    )
    for part, name, p in whole:
        local = getattr(part, name).to_local()
        # as `chunk` does: the last ranks may have fewer rows, or none
        start = min(len(p), dist.get_rank() * -(-len(p) // dist.get_world_size()))
        if len(local):
            local.copy_(_rows(p, start, start + len(local), stored.get(p)))


def _rows(p: Tensor, start: int, stop: int, location: TensorLocation | None) -> Tensor:
    """Rows of a weight from its file, or from memory if it changed since it was loaded.

    Only the first row is compared, so that little of the mapped file becomes resident.
    """
    if location is None or not read_rows(location, 0, 1, p.dtype).equal(p[:1].cpu()):
        return p[start:stop]
    return read_rows(location, start, stop, p.dtype)
