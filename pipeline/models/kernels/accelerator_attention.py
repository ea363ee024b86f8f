"""Attention of packed sequences on an accelerator, where no tensor is T × T.

A fused kernel reads the row, or blocks of queries read the keys that they see. Shapes as in
plain_attention.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import attention

from pipeline.models.device import to_device
from pipeline.models.kernels import random_tensors, suits_flash_attention, writes_scores
from pipeline.models.kernels.plain_attention import (
    Pairs,
    Rule,
    attend_each,
    attend_explicit,
    attend_row,
    sequence_starts,
    split_sequences,
)
from pipeline.models.kernels.repeatable import repeatable
from pipeline.models.pages import PAGE, BlockPages, PackedCache, PagePool, SequenceCache
from pipeline.project.probes import attempt, record

# torch's own function for it, `varlen_attn`, takes the host five times as long, and may compute
# forward by cuDNN what `_flash_attention_backward` then differentiates
_flash_forward = torch.ops.aten._flash_attention_forward
_flash_backward = torch.ops.aten._flash_attention_backward
BLOCK = 256  # queries whose scores are in memory at once
# relative, of outputs and gradients in 16 bits; what is masked wrongly differs by its own size
AGREEMENT = 0.05
# tokens of a sequence whose scores may all be in memory: 16 MiB for 32 heads in 16 bits
LONGEST = 512


def attend_on_accelerator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int],
    spans: list[int],
    rule: Rule,
    pages: BlockPages | None = None,
) -> Tensor:
    """(B, T, H, K) for q (B, H, T, K), k and v (B, G, S, K); no scores of a row are kept.

    Sequences of `lengths` are packed in the row, those of `spans` in the row of keys; query t of T
    sees key S - T + t. `pages`: keys and values in a cache, the new ones included, instead of k and v.
    """
    if pages is not None and _supports_pages(q, v, rule, pages):
        return _paged(q, pages, rule)
    pairs = None if pages is None else pages.pairs()
    packed = _supports_flash(q, v, rule, cached=lengths != spans)
    # torch's own attention: as many queries as keys, or one new token, which needs no mask
    fused = rule.plain and (max(lengths) <= LONGEST or not writes_scores(q))
    fused = fused and all(t in (1, s) for t, s in zip(lengths, spans, strict=True))
    one_row = len(lengths) == 1 and pairs is None
    if fused and one_row and (max(lengths) == 1 or not packed):
        return attend_row(q, k, v, rule).transpose(1, 2)
    if fused and not packed:
        return attend_each(q, pairs or split_sequences(k, v, spans), lengths, rule)
    if pairs is not None:
        k, v = _joined(pairs)
    return (_flash if packed else _blockwise)(q, k, v, lengths, spans, rule)


def _joined(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Keys and values of all sequences end to end, (1, G, S, K) each."""
    k, v = (torch.cat(parts, 2) for parts in zip(*pairs, strict=True))
    return k, v


def _supports_flash(q: Tensor, v: Tensor, rule: Rule, cached: bool) -> bool:
    """Whether torch's flash attention of packed sequences applies; `cached`: with older keys."""
    if rule.softcap is not None or not suits_flash_attention(q, v):
        return False
    has_numbers = type(q) is Tensor and not q.is_meta
    if torch.version.hip is None or not has_numbers:
        return True
    return _agrees(q.device, q.dtype, rule.window is not None, rule.sinks is not None, cached)


@cache
def take_flash_3(device: torch.device) -> bool:
    """Let flash attention 3 compute what torch's own kernels do, on Hopper, if it agrees.

    It is taken where its package, `flash_attn_interface`, is installed. Tried once.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    is_there = find_spec("flash_attn_interface") is not None
    # torch has it since 2.11
    if not is_there or not hasattr(attention, "activate_flash_attention_impl"):
        return False

    def activate() -> bool:
        attention.activate_flash_attention_impl("FA3")
        return all(_agrees(device, torch.bfloat16, has, False, False) for has in (False, True))

    if attempt("flash attention 3", "torch's own computes it", activate):
        return True
    attention.restore_flash_attention_impl()
    return False


def _supports_pages(q: Tensor, v: Tensor, rule: Rule, pages: BlockPages) -> bool:
    """Whether flash attention reads keys and values by a table of pages."""
    if pages.cache.pool.size % PAGE or torch.version.hip is not None:
        return False
    if not _supports_flash(q, v, rule, cached=True) or not _has_pages():
        return False
    has_numbers = type(q) is Tensor and not q.is_meta
    return not has_numbers or _pages_agree(
        q.device, q.dtype, rule.window is not None, rule.sinks is not None
    )


@cache
def _has_pages() -> bool:
    """Whether this torch's flash attention takes tables of pages: it came after 2.11."""
    arguments = {argument.name for argument in _flash_forward.default._schema.arguments}
    return {"block_table", "num_splits"} <= arguments


def _paged(q: Tensor, pages: BlockPages, rule: Rule) -> Tensor:
    """(1, T, H, K) for q (1, H, T, K); no key and no value is copied."""
    cache = pages.cache
    q_starts, k_starts, used, table = cache.tables_on(q.device)
    out, lse, *_ = _flash_forward(
        q[0].transpose(0, 1),  # (T, H, K)
        pages.keys,
        pages.values,
        q_starts,
        # flash attention 2 wants them, though it reads `seqused_k`; 3 wants none beside a table
        None if take_flash_3(q.device) else k_starts,
        max(cache.lengths),
        max(cache.spans),
        *_settings(rule),
        **_window(rule),
        seqused_k=used,
        block_table=table,
        # of a split row the sums depend on the longest sequence beside it
        num_splits=1,
    )  # (T, H, K) and (H, T)
    return _with_sinks(out, lse, rule.sinks)[None]


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor:
    """`out` (T, H, K) with the weights that a sink leaves of those with `lse` (H, T)."""
    if sinks is None:
        return out
    share = (lse - sinks.float()[:, None]).sigmoid()  # (H, T)
    return out * share.mT[..., None].to(out.dtype)


@cache
@torch.no_grad()
def _pages_agree(device: torch.device, dtype: torch.dtype, window: bool, sinks: bool) -> bool:
    """Whether flash attention reads pages as it reads what is copied out of them."""
    tried = f"flash attention of pages in {dtype} on {device}"
    slower = "keys and values are copied for each token"
    rule = Rule(0.125, 8 if window else None, None, None)
    if sinks:
        rule = replace(rule, sinks=torch.linspace(-1, 1, 4).to(device, dtype))

    def error(lengths: list[int]) -> float:
        pool, past = PagePool(), [PAGE + 4, 37]
        sequences = [SequenceCache(pool, 2 * PAGE) for _ in past]
        # the second's page stands between those of the first
        for n, length in ((0, 5), (1, 5), (0, PAGE + 5)):
            sequences[n].reserve(length)
        for counts in (past, lengths):
            shapes = [(1, heads, sum(counts), 64) for heads in (4, 2, 2)]
            q, k, v = (x.to(device, dtype) for x in random_tensors(*shapes))
            cache = PackedCache(sequences, counts)
            pages = cache.append(0, k, v)
            cache.advance()
        fast = _paged(q, pages, rule).float()
        plain = _blockwise(q, *_joined(pages.pairs()), lengths, cache.spans, rule).float()
        return float(torch.dist(fast, plain) / plain.norm())

    # one token of each takes another kernel
    largest = attempt(tried, slower, lambda: max(map(error, ([1, 1], [1, 3]))))
    if largest is not None and largest >= AGREEMENT:
        record(tried, f"its numbers are off by {largest:.0%}", slower)
    return largest is not None and largest < AGREEMENT


def _flash(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], spans: list[int], rule: Rule
) -> Tensor:
    """(B, T, H, K), all sequences in one call: a call for each would cost more than attention."""
    B, H, T, K = q.shape
    # not cached under FakeTensorMode, where the starts are fake
    starts = sequence_starts if type(q) is Tensor else sequence_starts.__wrapped__
    q_starts, k_starts = (starts((*sizes * B,), q.device) for sizes in (lengths, spans))
    longest = max(lengths), max(spans)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B·T, H, K) and (B·S, G, K)
    out: Tensor = _FlashAttention.apply(
        q, k, v, rule.sinks, q_starts, k_starts, longest, replace(rule, sinks=None)
    )  # type: ignore[no-untyped-call]
    return out.view(B, T, H, K)


def _window(rule: Rule) -> dict[str, Any]:
    """Of both ways: the scale, and the keys before and behind a query that it sees; -1: all."""
    left = -1 if rule.window is None else rule.window - 1
    return {"scale": rule.scale, "window_size_left": left, "window_size_right": 0}


def _settings(rule: Rule) -> tuple[float, bool, bool]:
    """No dropout, whether it is the causal mask alone, no weights in return."""
    return 0.0, rule.window is None, False


class _FlashAttention(torch.autograd.Function):
    """Flash attention with repeatable gradients and, of some models, a sink per head.

    A sink is one more score, whose weight goes to no value. With it the weights are exp(score − m),
    m = log(eˡ + eˢ) for the logsumexp l of the scores and the sink s: the output is that without
    the sink times σ(l − s). Given this output and m, flash attention's backward computes the
    gradients of q, k and v. The sink's weight is σ(s − l), so the gradient of s is
    −Σ σ(s − l) · (dO · O).
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        q_starts: Tensor,
        k_starts: Tensor,
        longest: tuple[int, int],
        rule: Rule,
    ) -> Tensor:
        given = (q, k, v, q_starts, k_starts, *longest)
        out, lse, *_ = _flash_forward(*given, *_settings(rule), **_window(rule))
        out = _with_sinks(out, lse, sinks)  # (T, H, K)
        ctx.save_for_backward(q, k, v, out, lse, q_starts, k_starts, sinks)
        ctx.longest, ctx.rule = longest, rule
        return out

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, q_starts, k_starts, sinks = ctx.saved_tensors
        d_out, d_sinks = outputs[0].contiguous(), None
        if sinks is not None:
            sink = sinks.float()[:, None]  # (H, 1)
            drift = (d_out.float() * out.float()).sum(-1).T  # (H, T)
            d_sinks = -((sink - lse).sigmoid() * drift).sum(1).to(sinks.dtype)
            lse = torch.logaddexp(lse, sink)
        # of dropout: there is none, and nobody reads them
        rng = torch.empty(2, dtype=torch.uint64, device=q.device)
        given = (d_out, q, k, v, out, lse, q_starts, k_starts, *ctx.longest)
        causal = ctx.rule.window is None
        with repeatable():
            grads = _flash_backward(*given, 0.0, causal, rng, rng, **_window(ctx.rule))
        return *grads, d_sinks, None, None, None, None


@cache
def _agrees(
    device: torch.device, dtype: torch.dtype, window: bool, sinks: bool, cached: bool
) -> bool:
    """Whether flash attention computes what `_blockwise` does, with gradients, on an AMD GPU.

    Its kernels there pad the logsumexp, and some versions ignore windows or align the causal mask
    with the first key.
    """
    kind = ["packed rows", *["windows"] * window, *["sinks"] * sinks, *["a cache"] * cached]
    tried = f"flash attention of {', '.join(kind)} in {dtype} on {device}"
    slower = "blocks of queries take longer"

    def compute(attend: Callable[..., Tensor]) -> list[Tensor]:
        """Output and gradients in fp32 of random input, a sequence of which exceeds its window."""
        lengths = [5, 40]
        spans = [9, 40] if cached else lengths
        T, S = sum(lengths), sum(spans)
        shapes = ((1, 4, T, 64), (1, 2, S, 64), (1, 2, S, 64), (1, T, 4, 64))
        *leaves, grad = (x.to(device, dtype) for x in random_tensors(*shapes))
        leaves += [torch.linspace(-1, 1, 4).to(device, dtype)] * sinks
        for leaf in leaves:
            leaf.requires_grad_()
        rule = Rule(0.125, 8 if window else None, None, leaves[3] if sinks else None)
        out = attend(*leaves[:3], lengths, spans, rule)
        return [x.detach().float() for x in (out, *torch.autograd.grad(out, leaves, grad))]

    def largest_error() -> float:
        # the block that asks may be recomputed, or without gradients: neither concerns what is
        # computed here
        with torch.inference_mode(False), torch.enable_grad(), saved_tensors_hooks(_same, _same):
            pairs = zip(compute(_flash), compute(_blockwise), strict=True)
        return max(float(torch.dist(fast, plain) / plain.norm()) for fast, plain in pairs)

    error = attempt(tried, slower, largest_error)
    if error is None:
        return False
    if error < AGREEMENT:
        return True
    record(tried, f"its numbers are off by {error:.0%}", slower)
    return False


def _same(x: Tensor) -> Tensor:
    return x


class SeenKeys(NamedTuple):
    """Queries start:stop of a row, and the keys first:last that any of them sees."""

    start: int
    stop: int
    first: int
    last: int


def seen_keys(lengths: Sequence[int], spans: Sequence[int], window: int | None) -> list[SeenKeys]:
    """All queries in order, at most BLOCK together. Short neighbours share a block."""
    parts = list[SeenKeys]()
    q = k = 0  # where the sequence begins
    for length, span in zip(lengths, spans, strict=True):
        before = span - length  # keys before its first query
        for start in range(0, length, BLOCK):
            stop = min(start + BLOCK, length)
            hidden = 0 if window is None else max(0, before + start + 1 - window)
            part = SeenKeys(q + start, q + stop, k + hidden, k + before + stop)
            if parts:
                joined = part._replace(start=parts[-1].start, first=parts[-1].first)
                fits = joined.stop - joined.start <= BLOCK
                if fits and joined.last - joined.first <= 2 * BLOCK:
                    parts.pop()
                    part = joined
            parts.append(part)
        q, k = q + length, k + span
    return parts


@lru_cache(maxsize=4)  # as `sequence_starts`; Gemma's blocks have one of two windows
def _seen(
    lengths: tuple[int, ...], spans: tuple[int, ...], window: int | None, device: torch.device
) -> Tensor:
    """(2, T): the first and the last key that each query sees."""
    bounds, k = list[Tensor](), 0
    for length, span in zip(lengths, spans, strict=True):
        last = torch.arange(k + span - length, k + span, dtype=torch.int32)
        first = torch.full_like(last, k) if window is None else (last - (window - 1)).clamp_(min=k)
        bounds.append(torch.stack((first, last)))
        k += span
    return to_device(torch.cat(bounds, 1), device)


def _blockwise(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], spans: list[int], rule: Rule
) -> Tensor:
    """(B, T, H, K), a block of queries at a time; backward computes its weights again."""
    seen = _seen if type(q) is Tensor else _seen.__wrapped__
    bounds = seen((*lengths,), (*spans,), rule.window, q.device)
    parts = seen_keys(lengths, spans, rule.window)
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
            inputs = _slices(q, k, v, part)
            out[:, part.start : part.stop] = _block(*inputs, sinks, bounds, part, rule)
        ctx.save_for_backward(q, k, v, sinks, bounds)
        ctx.parts, ctx.rule = parts, rule
        return out

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, sinks, bounds = ctx.saved_tensors
        # many blocks add to the first keys of a long sequence
        wide = torch.promote_types(q.dtype, torch.float32)
        d_q = torch.empty_like(q)
        d_k, d_v = (torch.zeros_like(x, dtype=wide) for x in (k, v))
        d_sinks: Tensor | None = None if sinks is None else torch.zeros_like(sinks, dtype=wide)
        for part in ctx.parts:
            with torch.enable_grad():
                inputs = (*_slices(q, k, v, part), sinks)
                leaves = [x.detach().requires_grad_() for x in inputs if x is not None]
                queries, keys, values, *sink = leaves
                last = sink[0] if sink else None
                out = _block(queries, keys, values, last, bounds, part, ctx.rule)
            grads = torch.autograd.grad(out, leaves, outputs[0][:, part.start : part.stop])
            del out  # with its scores
            d_q[:, :, part.start : part.stop] = grads[0]
            d_k[:, :, part.first : part.last] += grads[1]
            d_v[:, :, part.first : part.last] += grads[2]
            if d_sinks is not None:
                d_sinks += grads[3]
        d_sinks = None if d_sinks is None else d_sinks.to(sinks.dtype)
        return d_q, d_k.to(k.dtype), d_v.to(v.dtype), d_sinks, None, None, None


def _slices(q: Tensor, k: Tensor, v: Tensor, part: SeenKeys) -> tuple[Tensor, Tensor, Tensor]:
    """The block's queries, and the keys that they see with their values."""
    seen = slice(part.first, part.last)
    return q[:, :, part.start : part.stop], k[:, :, seen], v[:, :, seen]


def _block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor | None,
    bounds: Tensor,
    part: SeenKeys,
    rule: Rule,
) -> Tensor:
    """(B, t, H, K) of the block's queries; `bounds`: the first and last key of each of the row."""
    first, last = bounds[:, part.start : part.stop, None]  # (t, 1) each
    keys = torch.arange(part.first, part.last, dtype=torch.int32, device=q.device)
    visible = (keys >= first) & (keys <= last)  # (t, s)
    return attend_explicit(q, k, v, replace(rule, sinks=sinks), visible).transpose(1, 2)
