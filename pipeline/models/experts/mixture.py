"""A mixture's experts on their tokens: modules of transformers' interface, with updates or not."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.experts.grouped_product import (
    grouped_product,
    has_kernel_of_torch,
    runs_grouped_product,
)
from pipeline.models.kernels import uses_cpu_kernels

PROJECTIONS = ("gate_up_proj", "down_proj")
NAME = "lora_workbench"  # of our implementation, for transformers


class StackedUpdate(NamedTuple):
    """scale·BₑAₑ for each expert e: A (E, R, I), B (E, O, R)."""

    A: Tensor
    B: Tensor
    scale: float


Updates = Mapping[str, StackedUpdate]  # by the name of a projection


def register() -> str:
    """Make transformers know our implementation of experts; returns its name."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, _forward)
    return NAME


def _forward(base: Any, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """What transformers computes; by `mixed` where only transformers' products read numbers."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    plain = base.has_gate and not base.has_post_expert_norm and not base._is_expert_parallel
    reads = not uses_cpu_kernels(x.device) and not has_kernel_of_torch(x)
    if plain and reads and runs_grouped_product(x):
        return mixed(base, x, chosen, weights, {})
    out: Tensor = grouped_mm_experts_forward(base, x, chosen, weights)
    return out


def mixed(base: Any, x: Tensor, chosen: Tensor, weights: Tensor, updates: Updates) -> Tensor:
    """Σₖ weightₖ · expertₖ(x), (N, D), of x (N, D), for `chosen` experts and `weights` (N, K)."""
    # (N·K,): pairs of a token and an expert, by expert
    order = chosen.flatten().argsort(stable=True)
    rows = x[order // chosen.shape[1]]  # (N·K, D)
    if runs_grouped_product(rows):
        experts = chosen.flatten()[order]  # (N·K,)
        # (N·K, I)
        inner = base._apply_gate(_project_all(base, PROJECTIONS[0], rows, experts, updates))
        out = _project_all(base, PROJECTIONS[1], inner, experts, updates)  # (N·K, D)
    else:
        out = _expert_by_expert(base, rows, chosen, updates)
    weighted = out * weights.flatten()[order, None]
    # back in the order of the tokens by indices, and then summed: adding up by index is not
    # deterministic on CUDA
    return weighted[order.argsort()].view(*chosen.shape, -1).sum(1).to(x.dtype)  # (N·K, D) → (N, D)


def _project_all(base: Any, name: str, x: Tensor, experts: Tensor, updates: Updates) -> Tensor:
    """All experts' projections, (n, O), of rows (n, I) by expert. No number is read for it."""
    # where the rows of each expert end
    ends = torch.searchsorted(
        experts, torch.arange(base.num_experts, device=x.device), right=True, out_int32=True
    )
    weight = getattr(base, name).to(x.dtype)  # (E, O, I), or (E, I, O) if transposed
    out = grouped_product(x, weight.mT if base.is_transposed else weight, ends)
    if base.has_bias:
        out = out + getattr(base, f"{name}_bias").to(x.dtype)[experts]
    if (update := updates.get(name)) is not None:
        A, B = update.A.to(x.dtype), update.B.to(x.dtype)
        missing = -A.shape[1] % 8  # torch's kernel reads 16 bytes at once
        A, B = F.pad(A, (0, 0, 0, missing)), F.pad(B, (0, missing)).contiguous()
        out = out + grouped_product(grouped_product(x, A, ends), B, ends) * update.scale
    return out


def _expert_by_expert(base: Any, x: Tensor, chosen: Tensor, updates: Updates) -> Tensor:
    """(n, D) of rows (n, D) by expert: a product for each, whose number of rows must be read."""
    factors = {name: _factors(update, x.dtype) for name, update in updates.items()}
    counts = chosen.flatten().bincount(minlength=base.num_experts).tolist()
    out = []
    for expert, rows in enumerate(torch.split(x, counts)):
        if len(rows):
            # (n, I)
            inner = base._apply_gate(_project(base, PROJECTIONS[0], expert, rows, factors))
            out.append(_project(base, PROJECTIONS[1], expert, inner, factors))  # (n, D)
    return torch.cat(out)


def _factors(update: StackedUpdate, dtype: torch.dtype) -> list[tuple[Tensor, Tensor, float]]:
    # unbound once: backward of A[e] would fill a gradient of A's size for every expert
    A, B = update.A.to(dtype).unbind(), update.B.to(dtype).unbind()
    return [(a, b, update.scale) for a, b in zip(A, B, strict=True)]


def _project(
    base: Any,
    name: str,
    expert: int,
    x: Tensor,
    factors: Mapping[str, list[tuple[Tensor, Tensor, float]]],
) -> Tensor:
    """One expert's projection of its rows (n, I), with its update if it has one: (n, O)."""
    # they may be narrower than x where models are compared: `compute_in_fp32` widens only the
    # parameters of the module that runs
    weight = getattr(base, name)[expert].to(x.dtype)
    bias = getattr(base, f"{name}_bias")[expert].to(x.dtype) if base.has_bias else None
    out = F.linear(x, weight.T if base.is_transposed else weight, bias)
    if name in factors:
        a, b, scale = factors[name][expert]
        out = torch.addmm(out, F.linear(x, a), b.T, alpha=scale)
    return out
