"""MiniGPT's block with frozen weights and low-rank updates of its attention as one autograd node.

A small model's step is bound by calls: under autograd a product of 16 rows costs views, a node and
bookkeeping, which take longer than the product. Here forward and backward are the calls that
compute something; q, k and v are one product. With one adapter on MiniGPT, a step of 16 to 32 rows
takes 1/1.05 of the time that it takes without this file, one of 96 rows 1.14 × (CPU seconds of one
thread, in turns). For eight adapters, by native.c, see `_NativeBlock`.
"""

from collections.abc import Callable, Sequence
from ctypes import addressof, c_float, c_long, c_void_p
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.base import LinearUpdate, LowRankLinear

if TYPE_CHECKING:
    from pipeline.models.kernels.native import BlockShape

# Rows of a product from which oneDNN is faster than MKL: 128 × 64 by 64 × 256 takes 25 µs in place
# of 40 on a Zen 5, where MKL uses half the width of a vector; 16 rows take 11 µs in place of 8.
ONEDNN_FROM = 64

_aten = torch.ops.aten
_attend = _aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = _aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Frozen(NamedTuple):
    """What does not train in a block."""

    # weight, bias and epsilon before attention and feed-forward
    norms: Sequence[tuple[Tensor, Tensor, float]]
    attention: Sequence[tuple[Tensor, Tensor]]  # weights and biases of q, k, v and out
    fc1: tuple[Tensor, Tensor]
    fc2: tuple[Tensor, Tensor]
    heads: int
    mask: Tensor | None  # of a row of several sequences
    scale: float  # of the updates


class _Linear(NamedTuple):
    """Wx + s·BAx: W (O, I), A (L, R, I) and B (L, O, R); no A and B if the update is folded in."""

    weight: Tensor
    A: Tensor | None = None
    B: Tensor | None = None


def low_rank_block(
    x: Tensor,
    norms: Sequence[nn.LayerNorm],
    attention: Sequence[nn.Module],
    feed_forward: Sequence[nn.Module],
    heads: int,
    mask: Tensor | None,
    segments: Sequence[int] | None = None,
) -> Tensor | None:
    """x + attention(norm(x)), then + fc2(gelu(fc1(norm))), (B, T, D).

    `mask` (T, T): of a row of several sequences, whose lengths are `segments`.

    Returns None unless q, k, v and out (`attention`) have updates alike, nothing else of the block
    trains and all is in fp32.
    """
    if x.dtype != torch.float32:
        return None
    updates = list[LinearUpdate]()
    for linear in attention:
        update = linear.linear_update() if isinstance(linear, LowRankLinear) else None
        if update is None:
            return None
        updates.append(update)
    A, B, scale = updates[0].A, updates[0].B, updates[0].scale
    alike = all(update.A.shape == A.shape and update.scale == scale for update in updates)
    if not alike or A.dtype != x.dtype or B.shape[-2] != x.shape[-1]:
        return None
    frozen = list[tuple[Tensor, Tensor]]()
    for module in (*norms, *(update.base for update in updates), *feed_forward):
        pair = _frozen(module, x.dtype)
        if pair is None:
            return None
        frozen.append(pair)

    first, second, *linears, fc1, fc2 = frozen
    with_eps = ((*first, norms[0].eps), (*second, norms[1].eps))
    block = _Frozen(with_eps, linears, fc1, fc2, heads, mask, scale)
    factors = *(u.A for u in updates), *(u.B for u in updates)
    out: Tensor
    if A.dim() == 3 and _runs_natively(x, block, factors):
        lengths = tuple(segments or x.shape[1:2]) * len(x)
        out = _NativeBlock.apply(x, block, lengths, *factors)  # type: ignore[no-untyped-call]
    else:
        out = _Block.apply(x, block, *factors)  # type: ignore[no-untyped-call]
    return out


def _frozen(layer: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Weight and bias of a linear or norm; None if one is missing, trains or is not `dtype`."""
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    if weight is None or bias is None or weight.dtype != dtype:
        return None
    return None if weight.requires_grad or bias.requires_grad else (weight, bias)


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block: _Frozen, *factors: Tensor) -> Tensor:
        B, T, D = x.shape
        joined = _join(factors)
        qkv_proj, out_proj, _ = _layers(block, *joined)
        rows = x.reshape(B * T, D)
        n1, mean1, rstd1 = torch.native_layer_norm(rows, (D,), *block.norms[0])
        *biases, out_bias = (bias for _, bias in block.attention)
        qkv, low_qkv = _forward(n1, qkv_proj, torch.cat(biases), block.scale)  # (N, 3D)
        # (B, H, T, K) each
        q, k, v = qkv.view(B, T, 3, block.heads, -1).permute(2, 0, 3, 1, 4).unbind()
        y, log_sums = _attend(q, k, v, 0.0, block.mask is None, attn_mask=block.mask)
        merged = y.transpose(1, 2).reshape(B * T, D)
        attended, low_out = _forward(merged, out_proj, out_bias, block.scale)
        attended.add_(rows)
        del qkv_proj, out_proj  # folded weights are as large as all else: backward folds them again
        n2, mean2, rstd2 = torch.native_layer_norm(attended, (D,), *block.norms[1])
        u = _linear(n2, *block.fc1)
        out = _linear(_without_onednn(F.gelu, u), *block.fc2).add_(attended)
        ctx.block = block
        first = (rows, mean1, rstd1, n1, q, k, v, y, log_sums, merged)
        second = (attended, mean2, rstd2, u, low_qkv, low_out)
        ctx.save_for_backward(*first, *second, *joined)
        return out.view(B, T, D)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        block = ctx.block
        rows, mean1, rstd1, n1, q, k, v, y, log_sums, merged, *others = ctx.saved_tensors
        attended, mean2, rstd2, u, low_qkv, low_out, *joined = others
        B, H, T, _ = q.shape
        D = rows.shape[1]
        g = outputs[0].reshape(B * T, D)
        d_u = _without_onednn(_aten.gelu_backward, _linear(g, block.fc2[0].t()), u)
        d_n2 = _linear(d_u, block.fc1[0].t())
        d_attended = _norm_backward(d_n2, attended, mean2, rstd2, block.norms[1]).add_(g)
        del d_u, d_n2
        qkv_proj, out_proj, folded = _layers(block, *joined)
        d_merged, *of_out = _backward(d_attended, merged, out_proj, low_out, block.scale)
        d_y = d_merged.view(B, T, H, -1).transpose(1, 2)
        grads = _attend_backward(
            d_y, q, k, v, y, log_sums, 0.0, block.mask is None, attn_mask=block.mask
        )
        d_qkv = torch.cat([grad.transpose(1, 2).reshape(B * T, D) for grad in grads], 1)  # (N, 3D)
        del d_merged, d_y, grads
        d_n1, *of_qkv = _backward(
            d_qkv, n1, qkv_proj, low_qkv, block.scale, ctx.needs_input_grad[0]
        )
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = _norm_backward(d_n1, rows, mean1, rstd1, block.norms[0])
            d_x = d_x.add_(d_attended).view(B, T, D)
        if folded is not None:  # ∂A = s·Bᵀ∂W and ∂B = s·∂W·Aᵀ, four of each
            A, B_ = joined
            d_As = torch.baddbmm(A, B_.mT, folded, beta=0, alpha=block.scale).unbind()
            d_Bs = torch.baddbmm(B_, folded, A.mT, beta=0, alpha=block.scale).unbind()
            return d_x, None, *d_As, *d_Bs
        d_A, d_B = of_qkv
        L = len(joined[0])
        d_As = d_A.view(L, 3, -1, D).unbind(1)  # (L, R, D) each
        d_Bs = d_B.view(L, 3, D, 3, -1).diagonal(dim1=1, dim2=3).unbind(-1)  # (L, D, R) each
        return d_x, None, *d_As, of_out[0], *d_Bs, of_out[1]


def _runs_natively(x: Tensor, block: _Frozen, factors: Sequence[Tensor]) -> bool:
    """Whether native.c computes the block of many adapters.

    It is not asked to compute a single one's, whose numbers are the same without a compiler.
    """
    # one adapter does not need it
    from pipeline.models.kernels.native import COLUMNS, LANES, supports

    D, F_ = block.fc2[0].shape
    frozen = [*block.attention, block.fc1, block.fc2]
    return (
        not (D % COLUMNS or F_ % COLUMNS or D // block.heads % LANES)
        and supports(x, dtype=x.dtype)
        and all(weight.is_contiguous() for weight, _ in frozen)
        and all(factor[0].is_contiguous() for factor in factors)
    )


class _NativeBlock(torch.autograd.Function):
    """`_Block` of L adapters by native.c: of 8 with 16 tokens each, 0.2 ms instead of 0.7.

    It saves most where torch's calls take longest: in attention of short sequences and products of
    few rows. Gradients as in `_backward`.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, block: _Frozen, lengths: tuple[int, ...], *factors: Tensor
    ) -> Tensor:
        from pipeline.models.kernels.native import COLUMNS, LANES, BlockShape, call
        from pipeline.models.kernels.short_attention import starts_of

        x = x.contiguous()
        starts = starts_of(lengths)
        L, R, D = factors[0].shape
        F_ = len(block.fc1[0])  # width of the feed-forward
        n = x.numel() // D  # rows
        norms = [(weight, bias) for weight, bias, _ in block.norms]
        pairs = (*norms, *block.attention, block.fc1, block.fc2)
        pointers = [tensor.data_ptr() for tensor in chain.from_iterable(pairs)]
        eps = (c_float * 2)(*(eps for *_, eps in block.norms))
        shape = BlockShape(L, n // L, D, F_, block.heads, R, len(lengths), block.scale, eps)
        shape.frozen, shape.starts = (c_void_p * len(pointers))(*pointers), starts.data_ptr()

        # Ax of q, k and v together, and of out, in whole panels
        wide, narrow = (-(-columns // COLUMNS) * COLUMNS for columns in (3 * R, R))
        saved = x.new_empty(n * (6 * D + F_ + 4 + wide + narrow))  # for backward
        longest = -(-max(lengths) // LANES) * LANES
        weights = max(F_ * D, 3 * D * D)  # the largest right side of a frozen product
        updates = (3 * D + n // L) * wide + R * D
        attention = 2 * longest * (D // block.heads + 1)
        room = x.new_empty(n * (2 * D + max(F_, 3 * D)) + max(weights, updates, attention))
        out = torch.empty_like(x)
        call("low_rank_forward", _address(shape, factors), x, out, saved, room)
        # `block`, `starts` and what is saved keep the tensors to whose addresses `shape` points
        ctx.shape, ctx.block, ctx.starts, ctx.room = shape, block, starts, room.shape
        ctx.save_for_backward(x, saved, *factors)
        return out

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        from pipeline.models.kernels.native import call

        x, saved, *factors = ctx.saved_tensors
        d_out = outputs[0].contiguous()
        room = x.new_empty(ctx.room)
        grads = [factor.new_empty(factor.shape) for factor in factors]
        of_factors = (c_void_p * len(grads))(*[grad.data_ptr() for grad in grads])
        d_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        pointers = addressof(of_factors)
        call(
            "low_rank_backward", _address(ctx.shape, factors), d_out, x, saved, d_x, pointers, room
        )
        return d_x, None, None, *grads


def _address(shape: "BlockShape", factors: Sequence[Tensor]) -> int:
    """Point `shape` to these factors, and return its address.

    Backward sets them anew: those of a checkpointed block then have other addresses.
    """
    shape.factors = (c_void_p * len(factors))(*[factor.data_ptr() for factor in factors])
    shape.steps = (c_long * len(factors))(*[factor.stride(0) for factor in factors])
    return addressof(shape)


def _join(factors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The factors A of q, k, v and out, then B, of one adapter: (4, R, D), (4, D, R).

    Of L adapters: A (L, 3R, D) and B (L, 3D, 3R) of q, k and v, then those of out. B has blocks of
    zeros, which cost less than calls.
    """
    if factors[0].dim() == 2:
        return torch.stack(factors[:4]), torch.stack(factors[4:])
    A = torch.cat(factors[:3], 1)
    L, D, R = factors[4].shape
    B = A.new_zeros(L, 3 * D, 3 * R)
    for i, factor in enumerate(factors[4:7]):
        B[:, i * D : (i + 1) * D, i * R : (i + 1) * R] = factor
    return A, B, factors[3], factors[7]


def _layers(
    block: _Frozen, A: Tensor, B: Tensor, *of_out: Tensor
) -> tuple[_Linear, _Linear, Tensor | None]:
    """The layer of q, k and v with (3D, D) weights, that of out, and the folded weights.

    The folded weights of one adapter are (4, D, D). Updates of L adapters are not folded: that
    would be L weights, and as many gradients of weights.
    """
    weights = [weight for weight, _ in block.attention]
    if of_out:
        return _Linear(torch.cat(weights[:3]), A, B), _Linear(weights[3], *of_out), None
    folded = torch.stack(weights).baddbmm_(B, A, alpha=block.scale)
    return _Linear(folded[:3].flatten(0, 1)), _Linear(folded[3]), folded


def _forward(
    rows: Tensor, layer: _Linear, bias: Tensor, scale: float
) -> tuple[Tensor, Tensor | None]:
    """(N, O) of rows (N, I), and Ax (L, M, R) with L·M = N."""
    weight, A, B = layer
    out = _linear(rows, weight, bias)
    if A is None or B is None:
        return out, None
    low = torch.bmm(rows.view(len(A), -1, rows.shape[1]), A.mT)
    out.view(len(A), -1, out.shape[1]).baddbmm_(low, B.mT, alpha=scale)
    return out, low


def _backward(
    g: Tensor, rows: Tensor, layer: _Linear, low: Tensor | None, scale: float, needed: bool = True
) -> tuple[Any, ...]:
    """∂x (N, I) if it is `needed`; then ∂A and ∂B.

    A folded weight, used for the last time, is overwritten by ∂W.

    With g = ∂L/∂y and l = Ax: ∂B = s·gᵀl, ∂l = s·gB, ∂A = (∂l)ᵀx, ∂x = gW + ∂l·A.
    """
    weight, A, B = layer
    d_rows = _linear(g, weight.t()) if needed else None
    if A is None or B is None or low is None:
        torch.mm(g.t(), rows, out=weight)
        return (d_rows,)
    L = len(A)
    split = g.view(L, -1, g.shape[1])  # (L, M, O)
    # (L, R, M): in this order the product takes half the time
    d_low = torch.baddbmm(low.mT, B.mT, split.mT, beta=0, alpha=scale)
    if d_rows is not None:
        d_rows.view(L, -1, d_rows.shape[1]).baddbmm_(d_low.mT, A)
    d_A = torch.bmm(d_low, rows.view(L, -1, rows.shape[1]))
    return d_rows, d_A, torch.baddbmm(B, split.mT, low, beta=0, alpha=scale)


def _norm_backward(
    g: Tensor, rows: Tensor, mean: Tensor, rstd: Tensor, norm: tuple[Tensor, Tensor, float]
) -> Tensor:
    weight, bias, _ = norm
    shape = rows.shape[1:]
    d_rows: Tensor = _aten.native_layer_norm_backward(
        g, rows, shape, mean, rstd, weight, bias, (True, False, False)
    )[0]
    return d_rows


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if len(rows) < ONEDNN_FROM or not torch._C._has_mkldnn:
        return F.linear(rows, weight, bias)
    out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return out


def _without_onednn(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """GELU by torch's own loop: oneDNN's set-up takes 80 µs of a step of 16 rows."""
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        return function(*inputs)
    finally:
        torch._C._set_mkldnn_enabled(enabled)
