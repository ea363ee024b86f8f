"""Llama's blocks on an accelerator, in training and answers: that of llama_block.py in few calls.

Besides the products, a block launches a kernel for each norm, two for its sums, and few for rotary
positions and SwiGLU (one each with Liger). After its attention the last block computes only the rows
that carry a label.
"""

import copy
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from pipeline.models.base import CausalLM
from pipeline.models.kernels import agrees, random_tensors
from pipeline.models.kernels.accelerator.products import linears, term
from pipeline.models.kernels.decode import has_llama_parts, window_of
from pipeline.models.kernels.llama_block import ALONE, TrainingBlock

AGREEMENT = 1e-3  # in fp32, of outputs of order 1
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 16}
SMALL |= {"num_key_value_heads": 2, "num_hidden_layers": 1}
Rotate = Callable[[Tensor, Tensor, Tensor, Tensor], Sequence[Tensor]]


class AcceleratorBlock(TrainingBlock):
    """Its rotation, of q (B, H, T, K), k (B, G, T, K), cos and sin (B, T, K), is given."""

    rotation: Rotate

    @override
    def linears(self, x: Tensor, modules: Sequence[nn.Module]) -> Sequence[Tensor]:
        return linears(x, modules)

    @override
    def takes_rows(self, module: nn.Module) -> bool:
        return term(module) is not None

    @override
    def rotate(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Sequence[Tensor]:
        turned = self.rotation(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        return [y.transpose(1, 2) for y in turned]

    @override
    def norm_of_sum(self, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        total = x + added
        normed: Tensor = self.post_attention_layernorm(total)  # type: ignore[operator]
        return total, normed

    @override
    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        mlp: Any = self.mlp
        product: Tensor = mlp.product(gate, up, mlp.act_fn)
        return product

    @override
    def _supports(self, x: Tensor, options: dict[str, Any]) -> bool:
        return all(options.get(key) is None for key in ALONE)


def fuse_blocks(model: CausalLM, device: torch.device, checked: bool, rotation: Rotate) -> None:
    """Give the model's blocks the forward above where it computes the same.

    Its gated products are fused already. If not `checked`, the blocks' parts alone decide.
    """
    for block in filter(_has_parts, model.blocks):
        kind = type(block)
        if checked and not _same_block(kind, model, device):
            continue
        block.__class__ = _with_accelerator_forward(kind, rotation)  # type: ignore[arg-type]  # mypy: a class has no hash
        block.is_last = block is model.blocks[-1]  # type: ignore[assignment]


def _has_parts(block: Any) -> bool:
    """Whether it has Llama's parts and nothing that the forward above leaves out."""
    if isinstance(block, TrainingBlock) or not has_llama_parts(block):
        return False
    probe = torch.linspace(-4, 4, 33)
    is_silu = torch.allclose(block.mlp.act_fn(probe), F.silu(probe))
    return is_silu and window_of(block.self_attn) is None and "product" in vars(block.mlp)


@cache
def _with_accelerator_forward(kind: type[nn.Module], rotation: Rotate) -> type[nn.Module]:
    parts = {"rotation": staticmethod(rotation)}
    return type(kind.__name__, (AcceleratorBlock, kind), parts)


_same: dict[tuple[type, torch.device], bool] = {}


def _same_block(kind: type[nn.Module], model: Any, device: torch.device) -> bool:
    """Whether a small block of this class computes the same with the forward above. Tried once."""
    if (kind, device) not in _same:
        _same[kind, device] = _try_block(kind, model.config, device)
    return _same[kind, device]


@torch.no_grad()
def _try_block(kind: Any, config: Any, device: torch.device) -> bool:
    small = copy.deepcopy(config)
    for key, size in SMALL.items():
        setattr(small, key, size)
    tables = random_tensors((1, 7, 64), (1, 7, 8))
    x, angles = (table.to(device) for table in tables)
    angles = angles.repeat(1, 1, 2)  # (1, T, K), each of them for two numbers of a head

    def run(block: Any) -> Tensor:
        positions = angles.cos(), angles.sin()
        out: Tensor = block(x, position_embeddings=positions, segments=[4, 3])
        return out

    def made(forward: bool) -> Any:
        block = kind(small, 0).float().train()
        for parameter in block.parameters():
            drawn = random_tensors(parameter.shape)[0]
            parameter.copy_(drawn / 8 if parameter.dim() > 1 else 1 + drawn / 8)
        block = block.to(device)
        if forward:
            block.mlp.product = lambda gate, up, act: act(gate) * up
            block.__class__ = _with_accelerator_forward(kind, rotate)
        return block

    tried = f"the fused {kind.__name__}"
    return agrees(tried, lambda: run(made(True)), lambda: run(made(False)), 0, AGREEMENT)


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Sequence[Tensor]:
    """q (B, H, T, K) and k (B, G, T, K) turned by the angles of cos and sin (1 or B, T, K)."""
    turned: Sequence[Tensor] = _Rotary.apply(q, k, cos, sin)  # type: ignore[no-untyped-call]
    return turned


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        tables = _tables(cos, sin)
        return tuple(_turn(x, tables[0], tables[1]) for x in (q, k))

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        cos, _, back = _tables(*ctx.saved_tensors)
        return *(_turn(grad, cos, back) for grad in outputs), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x·cos, plus x with its halves exchanged times the signed sin."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


@lru_cache(maxsize=1)  # all blocks of a forward share them
def _tables(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """cos and the signed sin for each head, (1 or B, 1, T, K), and the sin that turns back."""
    first, second = sin.chunk(2, -1)
    forth = torch.cat((-first, second), -1)[:, None]
    return cos[:, None], forth, forth.roll(forth.shape[-1] // 2, -1)
