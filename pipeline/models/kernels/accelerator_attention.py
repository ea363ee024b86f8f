"""Attention of packed sequences on an accelerator, where no tensor is T × T: a fused kernel reads the row, or blocks of
queries read the keys that they see. Shapes as in plain_attention.py."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, lru_cache
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.models.device import to_device
from pipeline.models.kernels import suits_flash_attention
from pipeline.models.kernels.flash import flash_attention, supports_flash
from pipeline.models.kernels.plain_attention import (
    Pairs,
    Rule,
    attend_each,
    attend_explicit,
    attend_row,
    sequence_starts,
    split_sequences,
)

BLOCK = 256  # queries whose scores are in memory at once


def attend_on_accelerator(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], spans: list[int], rule: Rule, pairs: Pairs | None = None
) -> Tensor:
    """(B, T, H, K) for q (B, H, T, K), k and v (B, G, S, K), in the memory of these: no scores of a row are kept.

    Sequences of `lengths` are packed in the row, those of `spans` in the row of keys; query t of T sees key S - T + t.
    `pairs`: the keys and values of each, from a cache, instead of k and v.
    """
    fused = rule.plain and all(length in (1, span) for length, span in zip(lengths, spans, strict=True))
    if fused and len(lengths) == 1 and pairs is None:
        return attend_row(q, k, v, rule).transpose(1, 2)
    varlen = _supports_varlen(q, rule)
    flash = not varlen and rule.sinks is None and supports_flash(q)
    if fused and not varlen and not flash:
        return attend_each(q, pairs or split_sequences(k, v, spans), lengths, rule)
    if pairs is not None:
        k, v = (torch.cat(each, 2) for each in zip(*pairs, strict=True))
    if flash:
        return flash_attention(q, k, v, lengths, spans, rule.scale, rule.window, rule.softcap)
    return (_varlen if varlen else _blockwise)(q, k, v, lengths, spans, rule)


def _supports_varlen(q: Tensor, rule: Rule) -> bool:
    """Whether torch's varlen flash attention applies."""
    return rule.softcap is None and suits_flash_attention(q) and _has_varlen()


@cache
def _has_varlen() -> bool:
    """Whether this torch has it, with the arguments that are passed here: it came after 2.9."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"scale", "window_size", "enable_gqa", "return_aux"} <= signature(varlen_attn).parameters.keys()


def _varlen(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], spans: list[int], rule: Rule) -> Tensor:
    """(B, T, H, K), all sequences in one call: on a GPU a call for each would cost more than the attention."""
    from torch.nn.attention.varlen import varlen_attn

    B, H, T, K = q.shape
    starts = sequence_starts if type(q) is Tensor else sequence_starts.__wrapped__  # under FakeTensorMode they are fake
    q_starts, k_starts = (starts((*sizes * B,), q.device) for sizes in (lengths, spans))
    window = (-1 if rule.window is None else rule.window - 1, 0)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B·T, H, K) and (B·S, G, K)
    longest = max(lengths), max(spans)
    if rule.sinks is not None:
        out: Any = _SinkAttention.apply(q, k, v, rule.sinks, q_starts, k_starts, longest, rule.scale, window)  # type: ignore[no-untyped-call]
    else:
        options: dict[str, Any] = {"scale": rule.scale, "window_size": window, "enable_gqa": k.shape[1] != H}
        out = varlen_attn(q, k, v, q_starts, k_starts, *longest, **options)
    attended: Tensor = out.view(B, T, H, K)
    return attended


class _SinkAttention(torch.autograd.Function):
    """Flash attention with one more score per head, its sink, whose weight goes to no value.

    Its weights are exp(score − m), m = log(eˡ + eˢ) for the logsumexp l of the scores and the sink s: the output is
    that without the sink times σ(l − s). Given this output and m, flash attention's backward computes the gradients
    of q, k and v. The sink's weight is σ(s − l), so the gradient of s is −Σ σ(s − l) · (dO · O).
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor,
        q_starts: Tensor,
        k_starts: Tensor,
        longest: tuple[int, int],
        scale: float,
        window: tuple[int, int],
    ) -> Tensor:
        from torch.nn.attention.varlen import AuxRequest, varlen_attn

        options: dict[str, Any] = {"scale": scale, "window_size": window, "enable_gqa": q.shape[1] != k.shape[1]}
        aux = AuxRequest(lse=True)
        out, lse = varlen_attn(q, k, v, q_starts, k_starts, *longest, **options, return_aux=aux)  # lse: (H, T)
        sink = sinks.float()[:, None]  # (H, 1)
        out = out * (lse - sink).sigmoid().T[..., None].to(out.dtype)  # (T, H, K)
        ctx.save_for_backward(q, k, v, sinks, q_starts, k_starts, out, lse)
        ctx.longest, ctx.scale, ctx.window = longest, scale, window
        return out

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, q_starts, k_starts, out, lse = ctx.saved_tensors
        sink = sinks.float()[:, None]
        grads = _flash_backward(
            outputs[0].contiguous(),
            *(q, k, v, out, torch.logaddexp(lse, sink), q_starts, k_starts, *ctx.longest, ctx.scale, ctx.window),
        )
        drift = (outputs[0].float() * out.float()).sum(-1).T  # (H, T)
        d_sinks = -((sink - lse).sigmoid() * drift).sum(1).to(sinks.dtype)
        return *grads, d_sinks, None, None, None, None, None


def _flash_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_starts: Tensor,
    k_starts: Tensor,
    longest_q: int,
    longest_k: int,
    scale: float,
    window: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v: what autograd calls for `varlen_attn`."""
    rng = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, which there is none of
    longest, causal = (longest_q, longest_k), window == (-1, 0)
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.torch_attn._varlen_attn_backward(
        d_out, q, k, v, out, lse, q_starts, k_starts, *longest, causal, rng, scale, list(window)
    )
    return grads


class SeenKeys(NamedTuple):
    """Queries start:stop of a row, and the keys first:last that any of them sees."""

    start: int
    stop: int
    first: int
    last: int


def seen_keys(lengths: Sequence[int], spans: Sequence[int], window: int | None) -> list[SeenKeys]:
    """All queries in order, at most BLOCK together. Short neighbours share a block."""
    parts, q, k = list[SeenKeys](), 0, 0  # q and k: where the sequence begins
    for length, span in zip(lengths, spans, strict=True):
        before = span - length  # of its first query
        for start in range(0, length, BLOCK):
            stop = min(start + BLOCK, length)
            hidden = 0 if window is None else max(0, before + start + 1 - window)
            part = SeenKeys(q + start, q + stop, k + hidden, k + before + stop)
            joined = part if not parts else SeenKeys(parts[-1].start, part.stop, parts[-1].first, part.last)
            fits = joined.stop - joined.start <= BLOCK
            if parts and fits and joined.last - joined.first <= 2 * BLOCK:
                parts[-1] = joined
            else:
                parts.append(part)
        q, k = q + length, k + span
    return parts


@lru_cache(maxsize=4)  # as `sequence_starts`; Gemma's blocks have one of two windows
def _seen(lengths: tuple[int, ...], spans: tuple[int, ...], window: int | None, device: torch.device) -> Tensor:
    """(2, T): the first and the last key that each query sees."""
    rows, k = list[Tensor](), 0
    for length, span in zip(lengths, spans, strict=True):
        last = torch.arange(k + span - length, k + span, dtype=torch.int32)
        first = torch.full_like(last, k) if window is None else (last - (window - 1)).clamp_(min=k)
        rows.append(torch.stack((first, last)))
        k += span
    return to_device(torch.cat(rows, 1), device)


def _blockwise(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], spans: list[int], rule: Rule) -> Tensor:
    """(B, T, H, K), one block of queries after the other; backward computes each block's weights again."""
    seen = _seen if type(q) is Tensor else _seen.__wrapped__
    bounds, parts = seen((*lengths,), (*spans,), rule.window, q.device), seen_keys(lengths, spans, rule.window)
    out: Tensor = _Blockwise.apply(q, k, v, rule.sinks, bounds, parts, replace(rule, sinks=None))  # type: ignore[no-untyped-call]
    return out


class _Blockwise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        bounds: Tensor,
        parts: list[SeenKeys],
        rule: Rule,
    ) -> Tensor:
        B, H, T, _ = q.shape
        out = q.new_empty(B, T, H, v.shape[3])
        for part in parts:
            out[:, part.start : part.stop] = _block(*_slices(q, k, v, part), sinks, bounds, part, rule)
        ctx.save_for_backward(q, k, v, bounds, *(() if sinks is None else (sinks,)))
        ctx.parts, ctx.rule = parts, rule
        return out

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, bounds, *sinks = ctx.saved_tensors
        wide = torch.promote_types(q.dtype, torch.float32)  # many blocks add to the first keys of a long sequence
        d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        d_sinks = [torch.zeros_like(each, dtype=wide) for each in sinks]
        for part in ctx.parts:
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in (*_slices(q, k, v, part), *sinks)]
                own, keys, values, *sink = leaves
                out = _block(own, keys, values, sink[0] if sink else None, bounds, part, ctx.rule)
            grads = torch.autograd.grad(out, leaves, outputs[0][:, part.start : part.stop])
            del out  # with its scores
            d_q[:, :, part.start : part.stop] = grads[0]
            for total, grad in zip((d_k, d_v), grads[1:3], strict=True):
                total[:, :, part.first : part.last] += grad
            for total, grad in zip(d_sinks, grads[3:], strict=True):
                total += grad
        of_sinks = d_sinks[0].to(sinks[0].dtype) if sinks else None
        return d_q, d_k.to(k.dtype), d_v.to(v.dtype), of_sinks, None, None, None


def _slices(q: Tensor, k: Tensor, v: Tensor, part: SeenKeys) -> tuple[Tensor, Tensor, Tensor]:
    """The block's queries, and the keys that they see with their values."""
    seen = slice(part.first, part.last)
    return q[:, :, part.start : part.stop], k[:, :, seen], v[:, :, seen]


def _block(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, bounds: Tensor, part: SeenKeys, rule: Rule) -> Tensor:
    """(B, t, H, K) of the block's queries."""
    first, last = bounds[:, part.start : part.stop, None]  # (t, 1) each
    keys = torch.arange(part.first, part.last, dtype=torch.int32, device=q.device)
    visible = (keys >= first) & (keys <= last)  # (t, s)
    return attend_explicit(q, k, v, replace(rule, sinks=sinks), visible).transpose(1, 2)
