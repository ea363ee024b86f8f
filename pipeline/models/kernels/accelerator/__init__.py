"""Fused parts of transformers' models on a GPU: norms, feed-forwards, rotary positions, blocks.

Where `liger-kernel` is installed and the device is CUDA its Triton kernels compute them (Hsu et al.
2024, arXiv 2410.10989), otherwise functions in plain torch, which keep as little for backward:
without checkpointing a block of Qwen3-8B keeps 2 instead of 3 tensors as wide as its feed-forward.
A part is replaced only if what stands in for it computes the same of random input on that device.
"""

import copy
import inspect
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.models.base import CausalLM
from pipeline.models.kernels import agrees, random_tensors
from pipeline.models.kernels.accelerator.block import fuse_blocks, rotate
from pipeline.models.kernels.accelerator.products import fuse_linears
from pipeline.models.kernels.accelerator_attention import take_flash_3
from pipeline.models.kernels.rms_norm import RMSNorm, fuse_rms_norms
from pipeline.project.probes import PLAIN, record

PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}
AGREEMENT = 1e-3  # in fp32, of outputs of order 1: SiLU and GELU differ by a tenth
# gate, up, activation → act(gate)·up
Product = Callable[[Tensor, Tensor, Callable[[Tensor], Tensor]], Tensor]


class GatedProduct(torch.autograd.Function):
    """act(gate)·up; keeps gate and up alone, and computes the activation again for backward."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.act = act
        return act(gate) * up

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        gate, up = ctx.saved_tensors
        with torch.enable_grad():
            gate = gate.detach().requires_grad_(True)
            activated = ctx.act(gate)
        d_up = outputs[0] * activated.detach()
        (d_gate,) = torch.autograd.grad(activated, gate, outputs[0] * up)
        return d_gate, d_up, None


def fuse(model: CausalLM, device: torch.device) -> list[str]:
    """Replace the parts of a model that trains or answers on `device`; returns their names.

    Does not move it. A rotation is a function of a module of transformers: it is replaced for
    tensors on CUDA in all its models.
    """
    take_flash_3(device)
    parts = liger(device)
    checked = not model.embeddings.weight.is_meta  # without numbers there is nothing to compare
    names, products = [], list[Product]()
    if parts is not None:
        names += fuse_rms_norms(model, checked, parts.norm, device)
        products += parts.products
        _fuse_rotations(model, parts.rotate, device)
    # the norms which Liger does not compute in the same way
    names += fuse_rms_norms(model, checked, device=device)
    names += fuse_gates(model, [*products, GatedProduct.apply], device, checked)
    rotation = rotate
    if parts is not None and _same_rotation(rotate, parts.rotate, device):
        rotation = parts.rotate
    fuse_blocks(model, device, checked, rotation)
    return names + fuse_linears(model)


def fuse_gates(
    model: nn.Module, products: Sequence[Product], device: torch.device, checked: bool = True
) -> list[str]:
    """Replace act(gate)·up in place by the first of `products` that computes it on `device`.

    If not `checked`, nothing is compared: the first is taken wherever the parts are there.
    """
    names = []
    for name, module in model.named_modules():
        parts = {child for child, _ in module.named_children()}
        if parts != PARTS or "forward" in vars(module):
            continue
        for product in products:
            if not checked or _same_gate(module, product, device):
                module.product = product
                module.forward = MethodType(_gated_forward, module)
                names.append(name)
                break
    return names


def _gated_forward(mlp: Any, x: Tensor) -> Tensor:
    out: Tensor = mlp.down_proj(mlp.product(mlp.gate_proj(x), mlp.up_proj(x), mlp.act_fn))
    return out


@torch.no_grad()
def _same_gate(mlp: nn.Module, product: Product, device: torch.device) -> bool:
    """Whether this class computes down(act(gate(x))·up(x)): its forward runs with small linears."""
    x, *weights = (drawn.to(device) for drawn in random_tensors(*[(32, 32)] * 3))
    gate, up = (nn.Linear(32, 32, bias=False, device="meta") for _ in weights)
    for linear, weight in zip((gate, up), weights, strict=True):
        linear.weight = nn.Parameter(weight / 32**0.5)
    small, act = copy.copy(mlp), mlp.get_submodule("act_fn")
    parts = {"gate_proj": gate, "up_proj": up, "down_proj": nn.Identity(), "act_fn": act}
    small._modules = {name: parts[name] for name in mlp._modules}
    return agrees(
        f"the fused product of {type(mlp).__name__}",
        lambda: product(gate(x), up(x), act),
        lambda: type(mlp).forward(small, x),
        rtol=0,
        atol=AGREEMENT,
    )


def _fuse_rotations(model: nn.Module, rotate: Callable[..., Any], device: torch.device) -> None:
    name = "apply_rotary_pos_emb"
    for module in {sys.modules[type(part).__module__] for part in model.modules()}:
        original = vars(module).get(name)
        if inspect.isfunction(original) and _same_rotation(original, rotate, device):
            setattr(module, name, partial(_rotate, original, rotate))


def _rotate(
    original: Callable[..., Any], rotate: Callable[..., Any], *inputs: Tensor, **options: Any
) -> Any:
    """The rotations of q (B, H, T, K) and k (B, G, T, K), given with cos and sin (B, T, K)."""
    if len(inputs) == 4 and inputs[0].is_cuda and not options:
        return rotate(*inputs)
    return original(*inputs, **options)


@torch.no_grad()
def _same_rotation(
    original: Callable[..., Any], rotate: Callable[..., Any], device: torch.device
) -> bool:
    shapes = [(1, heads, 5, 16) for heads in (4, 2, 1)]
    q, k, half = (drawn.to(device) for drawn in random_tensors(*shapes))
    angles = half[0, :, :, :8].repeat(1, 1, 2)  # (1, T, K), each of them for two numbers of a head
    return agrees(
        "Liger's rotary positions",
        lambda: rotate(q.clone(), k.clone(), angles.cos(), angles.sin()),
        lambda: original(q.clone(), k.clone(), angles.cos(), angles.sin()),
        rtol=0,
        atol=AGREEMENT,
    )


def _without_activation(kind: Any, gate: Tensor, up: Tensor, _: Any) -> Tensor:
    """Liger's `kind` as a Product: the activation is part of its kernel."""
    out: Tensor = kind.apply(gate, up)
    return out


@cache
def liger(device: torch.device) -> Any:
    """Liger's `norm`, `products` and `rotate` for tensors on `device`; None without it."""
    if device.type != "cuda":
        return None
    try:
        from liger_kernel.ops import (
            LigerGELUMulFunction,
            LigerRMSNormFunction,
            LigerRopeFunction,
            LigerSiLUMulFunction,
        )
    except (ImportError, RuntimeError) as error:
        # not installed, which `lora doctor` lists, or with a Triton that does not fit this torch
        if not isinstance(error, ModuleNotFoundError) or error.name != "liger_kernel":
            record("Liger's kernels", error, PLAIN)
        return None

    class Norm(RMSNorm):
        def forward(self, x: Tensor) -> Tensor:
            if not self.offset:  # torch's own launches less: no gradient of a frozen weight
                return super().forward(x)
            # not in place: another branch may hold the gradient that would be overwritten
            casts = "gemma"
            out: Tensor = LigerRMSNormFunction.apply(
                x, self.weight, self.eps, self.offset, casts, False
            )
            return out

    return SimpleNamespace(
        norm=Norm,
        products=[
            partial(_without_activation, LigerSiLUMulFunction),
            partial(_without_activation, LigerGELUMulFunction),
        ],
        rotate=LigerRopeFunction.apply,
    )
