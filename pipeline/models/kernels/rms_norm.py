"""RMSNorm of transformers' models that keeps less for backward; the numbers differ by rounding.

transformers' norm keeps its input in fp32 besides. What a LoRA step needs beyond the weights is 6%
less on SmolLM2-135M (8 × 84 tokens in bf16, `--trace`) and 15%, 1.8 GiB, on Qwen3-8B (1 × 2,048).
The time is the same (1.01 ×).
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.kernels import agrees, random_tensors
from pipeline.models.kernels.native import call, supports

PROBES = 4  # rows of random input on which a replacement must agree with the original
AGREEMENT = 2**-6  # two bf16 roundings of an output of order 1


class RMSNorm(nn.Module):
    """x / √(mean x² + ε) · (offset + w), in fp32, rounded once; keeps x and 1/√… for backward."""

    def __init__(self, weight: nn.Parameter, eps: float, offset: float) -> None:
        super().__init__()
        self.weight, self.eps, self.offset = weight, eps, offset

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and not self.offset and x.dtype == self.weight.dtype:
            # one kernel, which keeps the same for backward
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        out: Tensor = _RMSNorm.apply(x, self.weight, self.eps, self.offset)  # type: ignore[no-untyped-call]
        return out

    def of_sum(self, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        """x + added, and its norm, in one pass where the weight is frozen."""
        if self.weight.requires_grad or not supports(x, added, self.weight):
            total = x + added
            return total, self(total)
        total, out = _NormOfSum.apply(x, added, self.weight, self.eps, self.offset)  # type: ignore[no-untyped-call]
        return total, out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        ctx.offset = offset
        if supports(x, weight):
            x = x.contiguous()
            _, out, inverse = _forward(x, None, weight, eps, offset)
            ctx.save_for_backward(x, weight, inverse)
            return out
        wide = x.to(torch.float32, copy=True)  # a copy: every operation from here on is in place
        norms = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = norms.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, inverse)
        return wide.mul_(inverse).mul_(weight.float() + offset).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        """With n = x·r: dx = r·(g − n·mean(g∘n)) for g = dy∘(offset + w); dw sums dy∘n."""
        x, weight, inverse = ctx.saved_tensors
        if not ctx.needs_input_grad[1] and supports(x, weight, outputs[0]):
            return _backward(outputs[0], None, x, weight, inverse, ctx.offset), None, None, None
        normed = x.to(torch.float32, copy=True).mul_(inverse)
        g = outputs[0].to(torch.float32, copy=True)
        d_weight = None
        if ctx.needs_input_grad[1]:
            d_weight = (g * normed).flatten(0, -2).sum(0).to(weight.dtype)
        g.mul_(weight.float() + ctx.offset)
        # −mean(g∘n), (..., 1)
        mean = torch.linalg.vecdot(g, normed).div_(-x.shape[-1]).unsqueeze(-1)
        d_x = g.addcmul_(normed, mean).mul_(inverse).to(x.dtype)
        return d_x, d_weight, None, None


class _NormOfSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, added: Tensor, weight: Tensor, eps: float, offset: float
    ) -> tuple[Tensor | None, Tensor]:
        total, out, inverse = _forward(x.contiguous(), added.contiguous(), weight, eps, offset)
        ctx.save_for_backward(total, weight, inverse)
        ctx.offset = offset
        return total, out

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        passed, grad = outputs
        total, weight, inverse = ctx.saved_tensors
        d_x = _backward(grad, passed.contiguous(), total, weight, inverse, ctx.offset)
        return d_x, d_x, None, None, None


def _forward(
    x: Tensor, added: Tensor | None, weight: Tensor, eps: float, offset: float
) -> tuple[Tensor | None, Tensor, Tensor]:
    """x + added if there is one, its norm, and 1/√… of each row, by native.c."""
    width = x.shape[-1]
    total = None if added is None else torch.empty_like(x)
    out, inverse = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
    tensors = (x, added, weight, total, out, inverse)
    call("rms_norm_forward", *tensors, x.numel() // width, width, eps, offset)
    return total, out, inverse


def _backward(
    grad: Tensor, passed: Tensor | None, x: Tensor, weight: Tensor, inverse: Tensor, offset: float
) -> Tensor:
    """dx, plus `passed` if there is one, by native.c."""
    grad = grad.contiguous()
    d_x = torch.empty_like(x)
    width = x.shape[-1]
    tensors = (grad, passed, x, weight, inverse, d_x)
    call("rms_norm_backward", *tensors, x.numel() // width, width, offset)
    return d_x


def fuse_rms_norms(
    model: nn.Module,
    checked: bool = True,
    kind: type[RMSNorm] = RMSNorm,
    device: torch.device | None = None,
) -> list[str]:
    """Replaces in place the norms that compute the same as one of `kind`; returns their names.

    Only classes named …RMSNorm are tried. They are compared on `device`, by default on their own.
    Fake tensors have no numbers to compare: with `checked` False all of these classes are replaced.
    """
    replaced = []
    for name, module in list(model.named_modules()):
        weight = getattr(module, "weight", None)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        named = type(module).__name__.endswith("RMSNorm") and not isinstance(module, RMSNorm)
        if not named or not isinstance(eps, float):
            continue
        if not isinstance(weight, nn.Parameter) or weight.dim() != 1:
            continue
        for offset in (0.0, 1.0) if checked else (0.0,):  # Gemma's weights count from 1
            ours = kind(weight, eps, offset).train(module.training)
            if not checked or _same_on_random_input(ours, module, device or weight.device):
                model.set_submodule(name, ours)
                replaced.append(name)
                break
    return replaced


@torch.no_grad()
def _same_on_random_input(ours: RMSNorm, theirs: nn.Module, device: torch.device) -> bool:
    """Whether both norms compute the same: a class's name and weight do not tell."""
    if device != ours.weight.device:
        ours, theirs = copy.deepcopy(ours).to(device), copy.deepcopy(theirs).to(device)
    probe = random_tensors((PROBES, len(ours.weight)))[0].to(ours.weight)  # (PROBES, D)
    tried = f"the fused {type(theirs).__name__}"
    return agrees(tried, lambda: ours(probe), lambda: theirs(probe), AGREEMENT, AGREEMENT)
