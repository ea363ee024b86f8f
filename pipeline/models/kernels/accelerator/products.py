"""Products of frozen linears with LoRA on an accelerator, in few calls.

A small model waits for the host there: what counts is how many kernels a step launches. Linears with
the same input share the product with their stacked A; what reaches that input is added inside the
products; A and B are read in the precision of the product, in which FlatOptimizer keeps a copy; and
their gradients are added to its fp32 buffer by the product itself.
"""

from collections.abc import Sequence
from functools import cache
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.base import CausalLM, LowBitLinear, LowRankLinear, RowScale
from pipeline.models.kernels import has_hooks, random_tensors
from pipeline.project.probes import holds

AGREEMENT = 0.02  # relative, of a sum of products of 16 bits


class Term(NamedTuple):
    """A frozen linear, its update s·BA if it has one, and what DoRA scales its outputs by."""

    base: nn.Linear | LowBitLinear
    A: Tensor | None = None  # (R, I)
    B: Tensor | None = None  # (O, R)
    scale: float = 1.0
    rows: RowScale | None = None

    def weight(self, dtype: torch.dtype) -> Tensor:
        """(O, I); one of few bits is dequantized."""
        if isinstance(self.base, LowBitLinear):
            return self.base.weight_in(dtype)
        return self.base.weight


def term(module: nn.Module) -> Term | None:
    """What the module computes, if it is a frozen linear or one of its updates; else None."""
    found: Term | None = None
    if isinstance(module, LowRankLinear):
        update, scaled = module.linear_update(), module.row_scale()
        if update is not None and update.A.dim() == 2:  # of one adapter
            found = Term(*update)
        elif scaled is not None:
            found = Term(*scaled[0], scaled[1])
    elif type(module) is nn.Linear or isinstance(module, LowBitLinear):
        found = Term(module)
    if found is None or has_hooks(found.base):
        return None
    is_frozen = not any(p.requires_grad for p in found.base.parameters())
    return found if is_frozen else None


def linears(x: Tensor, modules: Sequence[nn.Module]) -> Sequence[Tensor]:
    """The outputs (B, T, O) of linears with the same x (B, T, I), with or without LoRA."""
    terms = [term(module) for module in modules]
    if None in terms:
        return [module(x) for module in modules]
    trained, is_low_bit = list[Tensor | None](), False
    for found in terms:
        assert found is not None
        is_low_bit |= isinstance(found.base, LowBitLinear)
        trained += found.A, found.B, found.rows and found.rows.magnitude
    if is_low_bit and not torch.is_grad_enabled():
        # few rows are multiplied by the codes: a weight is not dequantized for each token
        return [type(module).forward(module, x) for module in modules]
    outs: Sequence[Tensor] = _Linears.apply(x, terms, *trained)  # type: ignore[no-untyped-call]
    return outs


def fuse_linears(model: CausalLM) -> list[str]:
    """Give the blocks' linears with LoRA the forward above, in place; returns their names."""
    inside, names = {*model.blocks.modules()}, []
    for name, module in model.named_modules():
        if module in inside and isinstance(module, LowRankLinear) and term(module) is not None:
            module.forward = MethodType(_forward, module)
            names.append(name)
    return names


def _forward(module: nn.Module, x: Tensor) -> Tensor:
    if term(module) is None:  # its adapter is off, or it trains with dropout
        out: Tensor = type(module).forward(module, x)
        return out
    return linears(x, (module,))[0]


class _Linears(torch.autograd.Function):
    """rᵢ∘(Wᵢx + sᵢ·BᵢAᵢx) + bᵢ of n linears with the same x (B, T, I).

    A and B may be missing. r is 1, but DoRA's magnitude over norm.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, terms: Sequence[Term], *_trained: Tensor | None
    ) -> tuple[Tensor, ...]:
        rows = x.flatten(0, -2)  # (N, I)
        outs = list[Tensor]()
        for term in terms:
            bias = term.base.bias if term.rows is None else None
            outs.append(F.linear(rows, term.weight(x.dtype), bias))  # (N, O)
        adapted = [i for i, term in enumerate(terms) if term.A is not None]
        ctx.terms, ctx.adapted, ctx.shape = terms, adapted, x.shape
        if adapted:
            As, Bs = ([_narrow(terms[i][j], x.dtype) for i in adapted] for j in (1, 2))
            A = torch.cat(As) if len(As) > 1 else As[0]  # (ΣR, I)
            low = F.linear(rows, A)  # (N, ΣR)
            ctx.ranks = [len(part) for part in As]
            parts = low.split(ctx.ranks, 1)  # type: ignore[no-untyped-call]
            for i, B, part in zip(adapted, Bs, parts, strict=True):
                outs[i].addmm_(part, B.t(), alpha=terms[i].scale)
            unscaled = list[Tensor]()
            for i in adapted:
                if (rows_scale := terms[i].rows) is not None:
                    unscaled.append(outs[i])
                    outs[i] = _scale_rows(outs[i], rows_scale.ratio, terms[i].base.bias)
            ctx.save_for_backward(rows, low, A, *Bs, *unscaled)
        # no views, which could not be added to in place
        return tuple(
            torch.ops.aten._unsafe_view(out, [*x.shape[:-1], out.shape[1]]) for out in outs
        )

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        """dx = Σ gᵢWᵢ + sᵢ·gᵢBᵢAᵢ; dAᵢ = (sᵢ·gᵢBᵢ)ᵀx; dBᵢ = sᵢ·gᵢᵀ(Aᵢx).

        Before that, of DoRA: dm = Σ g∘(Wx + s·BAx) / ‖W + s·BA‖ over the rows, and g becomes r∘g.
        """
        saved = ctx.saved_tensors  # once: a checkpointed block gives them once
        grads = [grad.flatten(0, -2) for grad in outputs]
        d_trained = list[Tensor | None]([None]) * (3 * len(ctx.terms))
        adapted: list[int] = ctx.adapted
        scaled = [i for i in adapted if ctx.terms[i].rows is not None]
        for i, before in zip(scaled, saved[3 + len(adapted) :], strict=True):
            scale = ctx.terms[i].rows
            d_trained[3 * i + 2] = _magnitude_gradient(grads[i], before, scale.norms)
            grads[i] = _scale_rows(grads[i], scale.ratio, None)
        d_x: Tensor | None = None
        if ctx.needs_input_grad[0]:
            for grad, term in zip(grads, ctx.terms, strict=True):
                weight = term.weight(grad.dtype)
                d_x = grad @ weight if d_x is None else d_x.addmm_(grad, weight)
        if adapted:
            rows, low, A, *Bs = saved[: 3 + len(adapted)]
            d_low = torch.empty_like(low)
            parts = zip(Bs, low.split(ctx.ranks, 1), d_low.split(ctx.ranks, 1), strict=True)  # type: ignore[no-untyped-call]
            for i, (B, part, d_part) in zip(adapted, parts, strict=True):
                term = ctx.terms[i]
                torch.addmm(d_part, grads[i], B, beta=0, alpha=term.scale, out=d_part)
                d_trained[3 * i] = _added(term.A, d_part.t(), rows, 1)
                d_trained[3 * i + 1] = _added(term.B, grads[i].t(), part, term.scale)
            if d_x is not None:
                d_x.addmm_(d_low, A)
        return None if d_x is None else d_x.view(ctx.shape), None, *d_trained


def _scale_rows(rows: Tensor, ratio: Tensor, bias: Tensor | None) -> Tensor:
    """`rows` (N, O) times `ratio` (O,) in fp32, plus a bias; rounded once."""
    out = torch.empty_like(rows)
    if bias is None:
        return torch.mul(rows, ratio, out=out)
    return torch.addcmul(bias, rows, ratio, out=out)


def _magnitude_gradient(grad: Tensor, before: Tensor, norms: Tensor) -> Tensor:
    """DoRA's dm (O,), of what its outputs were `before` they were scaled."""
    return (grad * before).sum(0, dtype=norms.dtype) / norms


def _narrow(factor: Any, dtype: torch.dtype) -> Tensor:
    """A or B in `dtype`: the copy that the optimizer keeps, if there is one."""
    copied: Tensor | None = getattr(factor, "in_16_bits", None)
    if copied is None or (copied.dtype, copied.device) != (dtype, factor.device):
        copied = factor.detach().to(dtype)
    return copied


def _added(factor: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor | None:
    """The gradient of A or B, scale · left @ right; None once it is in the optimizer's buffer."""
    wide = factor.grad
    if wide is None or getattr(factor, "in_16_bits", None) is None:
        return (left @ right).mul_(scale).to(factor.dtype)
    if wide.dtype == left.dtype:
        wide.addmm_(left, right, alpha=scale)
    elif adds_in_fp32(wide.device, left.dtype):
        _add_in_fp32(wide, left, right, scale)
    else:
        wide.add_(left @ right, alpha=scale)
    return None


def _add_in_fp32(wide: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """wide (m, n) in fp32 += scale · left @ right of 16 bits, not rounded in between."""
    torch.ops.aten.addmm.dtype_out(wide, left, right, torch.float32, beta=1, alpha=scale, out=wide)


@cache
def adds_in_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch adds products of 16 bits to fp32 there, in place. Tried once."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    tried, slower = f"products of {dtype} added in fp32 on {device}", "they are added in two calls"

    def agrees() -> bool:
        wide, left, right = (x.to(device) for x in random_tensors((24, 40), (24, 16), (16, 40)))
        left, right = left.to(dtype), right.to(dtype)
        expected = wide + 2 * (left.float() @ right.float())
        _add_in_fp32(wide, left, right, 2)
        return bool(torch.dist(wide, expected) <= AGREEMENT * expected.norm())

    return holds(tried, slower, agrees)
