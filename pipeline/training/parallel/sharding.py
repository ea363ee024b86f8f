"""Frozen weights sharded over the ranks (FSDP2)."""

import torch
import torch.distributed as dist

from pipeline.errors import UserError
from pipeline.models.base import CausalLM, LowBitLinear
from pipeline.models.device import free_bytes, model_bytes
from pipeline.training.parallel.collectives import all_reduce_max


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
