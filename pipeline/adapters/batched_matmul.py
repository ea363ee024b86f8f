"""A frozen linear plus L low-rank updates, each applied to its own share of the rows."""

from typing import Any

import torch
from torch import Tensor, nn


def batched_lora_forward(x: Tensor, base: nn.Module, A: Tensor, B: Tensor, scales: Tensor) -> Tensor:
    """Wx + b + sₙ·BₙAₙx, (..., O), for rows (..., I), A (L, R, I), B (L, O, R), scales (L, 1, 1)."""
    if type(base) is nn.Linear and base.bias is not None:
        out: Tensor = _BatchedLoRA.apply(x, base.weight, base.bias, A, B, scales)  # type: ignore[no-untyped-call]
        return out
    rows = x.reshape(len(A), -1, x.shape[-1])  # (L, M, I)
    low = (torch.bmm(rows, A.transpose(1, 2)) * scales).to(x.dtype)  # (L, M, R)
    frozen: Tensor = base(x)  # (..., O)
    return torch.baddbmm(frozen.reshape(*rows.shape[:2], -1), low, B.transpose(1, 2)).view_as(frozen)


class _BatchedLoRA(torch.autograd.Function):
    """The same with one call per product: small models spend their time on calls."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, A: Tensor, B: Tensor, scales: Tensor) -> Tensor:
        rows = x.reshape(len(A), -1, x.shape[-1])  # (L, M, I)
        out = torch.nn.functional.linear(x, weight, bias)
        low = torch.bmm(rows, A.mT).mul_(scales)  # (L, M, R)
        out.view(len(A), -1, out.shape[-1]).baddbmm_(low, B.mT)
        ctx.save_for_backward(rows, weight, low, A, B, scales)
        return out

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        """With g = ∂L/∂y and l = s·Ax: ∂B = gᵀl, ∂l = gB, ∂A = s·(∂l)ᵀx, ∂x = gW + s·∂l·A (the document's §4.3)."""
        rows, weight, low, A, B, scales = ctx.saved_tensors
        g = outputs[0].reshape(len(A), -1, outputs[0].shape[-1])  # (L, M, O)
        d_low = torch.bmm(g, B).mul_(scales)  # (L, M, R)
        d_x = None
        if ctx.needs_input_grad[0]:  # not in the first layer that trains
            d_x = outputs[0] @ weight
            d_x.view_as(rows).baddbmm_(d_low, A)
        return d_x, None, None, torch.bmm(d_low.mT, rows), torch.bmm(g.mT, low), None
