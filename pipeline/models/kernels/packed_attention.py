"""Attention of transformers' models: causal, and within each sequence of a packed row.

B batch (1 if `segments` packs sequences into one row), T queries, S keys, K head size, H query heads, of which R = H/G
share each of the G key and value heads. There is no dropout: a run gives the same numbers when it is repeated.

Short sequences on the CPU train with plain batched matrix products (`short_attention`): the flash kernel's backward
spends its time outside the products there. A LoRA step of SmolLM2-135M in bf16, 8 sequences of 12 to 300 tokens, takes
1/1.2 of the time (measured on two cores, in turns with torch's flash attention).

On an accelerator no tensor is T × T: a fused kernel reads the row, or blocks of queries read the keys that they see.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import addressof
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from inspect import signature
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.base import PackedCache, Prefix
from pipeline.models.device import to_device
from pipeline.models.kernels import runs_flash_attention, uses_cpu_kernels
from pipeline.models.kernels.native import AttentionShape, native, supports

Pairs = list[tuple[Tensor, Tensor]]  # keys and values of each sequence
NAME = "lora_segments"
# Tokens of a short sequence; beyond it the weights kept for backward, T² per head, cost more than they save.
LONGEST = 512
NATIVE_LANES = 32  # of which native.c's attention wants multiples as a head's size
BLOCK = 128  # queries of one product of short sequences; sharing products takes a sixth off their attention's time


@dataclass(frozen=True)
class Rule:
    """How scores become weights, apart from the causal mask."""

    scale: float
    window: int | None = None  # keys that a query sees, its own included
    softcap: float | None = None
    sinks: Tensor | None = None  # (H,): one more score per head, whose weight goes to no value

    @property
    def explicit(self) -> bool:
        """Whether the scores themselves must be changed, which fused attention cannot do."""
        return self.softcap is not None or self.sinks is not None

    @property
    def plain(self) -> bool:
        """Whether it is the causal mask alone."""
        return self.window is None and not self.explicit


def register(function: Callable[..., Any] | None = None) -> str:
    """The name to pass to transformers as `attn_implementation`. Such a model passes no masks.

    `function`: what stands in for `attend`.
    """
    from transformers import AttentionInterface  # takes two seconds, which MiniGPT does not need

    AttentionInterface.register(NAME, function or attend)
    return NAME


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    segments: Sequence[int] | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    prefix: Prefix | None = None,
    past: PackedCache | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """softmax(QKᵀ·scaling + causal mask)·V, (B, T, H, K), for query (B, H, T, K), key and value (B, G, S, K).

    segments: lengths, T in total, of the sequences in the one row; None: every row is one sequence, and with more keys
    than queries (a cache) query t has position S - T + t. prefix: adds keys and values before those of each sequence.
    past: holds those that came before in each sequence, and takes the new ones.
    Raises ValueError for a mask: rows here have no padding.
    """
    if attention_mask is not None:
        raise ValueError("this attention takes no mask: pack sequences end to end and pass their lengths as segments")
    if segments is not None and (query.shape[0] != 1 or sum(segments) != query.shape[2]):
        raise ValueError(f"segments {list(segments)} do not add up to one row of {query.shape[2]} tokens")
    lengths = [query.shape[2]] if segments is None else list(segments)
    spans = [key.shape[2]] if segments is None else lengths  # lengths of keys
    if prefix is not None:
        own_keys = key.shape[2]
        key, value = prefix(module.layer_idx, key, value, spans)  # type: ignore[arg-type]
        added = (key.shape[2] - own_keys) // len(spans)
        spans = [added + span for span in spans]
    pairs = None if past is None else past.update(module.layer_idx, key, value, lengths)  # type: ignore[arg-type]
    if pairs is not None:
        spans = [keys.shape[2] for keys, _ in pairs]
    # a window that hides no key is none: most kernels have only a causal mask
    window = None if sliding_window is None or sliding_window >= max(spans) else sliding_window
    rule = Rule(query.shape[3] ** -0.5 if scaling is None else scaling, window, softcap, s_aux)
    for layer, weights in _recorders:
        if getattr(module, "layer_idx", None) == layer:
            visible = _visible(query.shape[2], key.shape[2], rule.window, query.device)
            weights.append(_weights(query, key, rule, visible))

    if not uses_cpu_kernels(query.device):
        out = attend_on_accelerator(query, key, value, lengths, spans, rule, pairs)
    # Also in training without gradients: with its adapter off, a model then gives the bits that its base gives.
    elif module.training and rule.plain and lengths == spans and max(lengths) <= LONGEST:
        out = short_attention(query, key, value, lengths, rule.scale)
    elif len(lengths) == 1 and pairs is None:
        out = _row(query, key, value, rule).transpose(1, 2)
    else:
        out = _each_sequence(query, pairs or _split(key, value, spans), lengths, rule)
    return out.contiguous(), None


_recorders: list[tuple[int, list[Tensor]]] = []


@contextmanager
def record_weights(layer: int) -> Iterator[list[Tensor]]:
    """The attention weights of block number `layer`, (B, H, T, S) for each call meanwhile; row t is token t's."""
    recorder = (layer, list[Tensor]())
    _recorders.append(recorder)
    try:
        yield recorder[1]
    finally:
        _recorders.remove(recorder)


def attend_on_accelerator(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], spans: list[int], rule: Rule, pairs: Pairs | None = None
) -> Tensor:
    """(B, T, H, K) for q (B, H, T, K), k and v (B, G, S, K), in the memory of these: no scores of a row are kept.

    Sequences of `lengths` are packed in the row, those of `spans` in the row of keys; query t of T sees key S - T + t.
    `pairs`: the keys and values of each, from a cache, instead of k and v.
    """
    fused = rule.plain and all(length in (1, span) for length, span in zip(lengths, spans, strict=True))
    if fused and len(lengths) == 1 and pairs is None:
        return _row(q, k, v, rule).transpose(1, 2)
    varlen = _supports_varlen(q, rule)
    if fused and not varlen:
        return _each_sequence(q, pairs or _split(k, v, spans), lengths, rule)
    if pairs is not None:
        k, v = (torch.cat(each, 2) for each in zip(*pairs, strict=True))
    return (_varlen if varlen else _blockwise)(q, k, v, lengths, spans, rule)


def _split(k: Tensor, v: Tensor, spans: list[int]) -> Pairs:
    """Keys and values of each sequence."""
    return [*zip(k.split_with_sizes(spans, 2), v.split_with_sizes(spans, 2), strict=True)]


def _each_sequence(q: Tensor, pairs: Pairs, lengths: list[int], rule: Rule) -> Tensor:
    """(1, T, H, K): a call for each."""
    each = zip(q.split_with_sizes(lengths, 2), pairs, strict=True)
    return torch.cat([_row(own, *pair, rule).transpose(1, 2) for own, pair in each], 1)


def _supports_varlen(q: Tensor, rule: Rule) -> bool:
    """Whether torch's varlen flash attention applies."""
    if q.dtype not in (torch.bfloat16, torch.float16) or rule.softcap is not None:
        return False
    # the head sizes that flash attention has kernels for
    return q.shape[3] <= 256 and q.shape[3] % 8 == 0 and runs_flash_attention(q.device) and _has_varlen()


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
    starts = _starts if type(q) is Tensor else _starts.__wrapped__  # under FakeTensorMode they are fake
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


@lru_cache(maxsize=4)  # all layers of a forward use the same, also when they run again in backward
def _starts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each sequence begins, and the end of the last: int32 on the device."""
    return to_device(torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32), device)


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


ACCELERATOR_BLOCK = 256  # queries whose scores are in memory at once


class SeenKeys(NamedTuple):
    """Queries start:stop of a row, and the keys first:last that any of them sees."""

    start: int
    stop: int
    first: int
    last: int


def seen_keys(lengths: Sequence[int], spans: Sequence[int], window: int | None) -> list[SeenKeys]:
    """All queries in order, at most ACCELERATOR_BLOCK together. Short neighbours share a block."""
    parts, q, k = list[SeenKeys](), 0, 0  # q and k: where the sequence begins
    for length, span in zip(lengths, spans, strict=True):
        before = span - length  # of its first query
        for start in range(0, length, ACCELERATOR_BLOCK):
            stop = min(start + ACCELERATOR_BLOCK, length)
            hidden = 0 if window is None else max(0, before + start + 1 - window)
            part = SeenKeys(q + start, q + stop, k + hidden, k + before + stop)
            joined = part if not parts else SeenKeys(parts[-1].start, part.stop, parts[-1].first, part.last)
            fits = joined.stop - joined.start <= ACCELERATOR_BLOCK
            if parts and fits and joined.last - joined.first <= 2 * ACCELERATOR_BLOCK:
                parts[-1] = joined
            else:
                parts.append(part)
        q, k = q + length, k + span
    return parts


@lru_cache(maxsize=4)  # as `_starts`; Gemma's blocks have one of two windows
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
    window = None if rule.window is None else rule.window
    seen = _seen if type(q) is Tensor else _seen.__wrapped__
    bounds, parts = seen((*lengths,), (*spans,), window, q.device), seen_keys(lengths, spans, window)
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
    return _explicit(q, k, v, replace(rule, sinks=sinks), visible).transpose(1, 2)


def _row(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    """(B, H, T, K), each row one sequence."""
    B, H, T, K = q.shape
    G, S = k.shape[1:3]
    if rule.explicit:
        return _explicit(q, k, v, rule, _visible(T, S, rule.window, q.device))
    plain = (T == S or T == 1) and (rule.window is None or rule.window >= S)
    if plain and T == 1:
        # A group's R heads take the place of tokens, so that no kernel repeats keys and values: 2 × as fast as torch's
        # enable_gqa after 32 tokens, 5 × after 256 (measured on the CPU with SmolLM2's 9 heads in 3 groups, bf16).
        grouped = q.reshape(B, G, H // G, K)  # (B, G, R, K)
        return F.scaled_dot_product_attention(grouped, k, v, scale=rule.scale).reshape(q.shape)
    mask = None if plain else _visible(T, S, rule.window, q.device)
    if H != G and not uses_cpu_kernels(q.device) and not _supports_varlen(q, rule):
        # only flash attention reads shared heads; without it torch would fall back to scores of T × T
        k, v = (x.repeat_interleave(H // G, 1) for x in (k, v))
        G = H
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=plain, scale=rule.scale, enable_gqa=H != G)


def _explicit(q: Tensor, k: Tensor, v: Tensor, rule: Rule, visible: Tensor) -> Tensor:
    """(B, H, T, K) from the scores themselves, so that they can be capped and extended by sinks."""
    B, H, T, _ = q.shape
    G, S = k.shape[1:3]
    weights = _weights(q, k, rule, visible).to(q.dtype).view(B, G, H // G, T, S)
    return (weights @ v.unsqueeze(2)).flatten(1, 2)  # (B, G, R, T, K) → (B, H, T, K)


def _weights(q: Tensor, k: Tensor, rule: Rule, visible: Tensor) -> Tensor:
    """softmax of the scores as `rule` says, (B, H, T, S) in fp32; row t is token t's, which sees `visible` (T, S)."""
    B, H, T, _ = q.shape
    G, S = k.shape[1:3]
    grouped = q.reshape(B, G, H // G, T, -1)  # (B, G, R, T, K)
    scores = grouped @ k.unsqueeze(2).transpose(3, 4) * rule.scale  # (B, G, R, T, S)
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    scores = scores.float().masked_fill(~visible, -torch.inf)
    if rule.sinks is not None:
        sinks = rule.sinks.float().view(1, G, H // G, 1, 1).expand(B, -1, -1, T, 1)
        scores = torch.cat([scores, sinks], -1)  # (B, G, R, T, S + 1)
    return scores.softmax(-1)[..., :S].flatten(1, 2)  # without the sink's share; (B, G, R, T, S) → (B, H, T, S)


def _visible(T: int, S: int, window: int | None, device: torch.device) -> Tensor:
    """(T, S), True where a query sees a key."""
    visible = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)  # query t has position S - T + t
    return visible if window is None else visible.triu(S - T - window + 1)


def short_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """(B, T, H, K) for q (B, H, T, K), k and v (B, G, T, K); their T tokens are packed sequences of `lengths`.

    A head group's R·t queries are the rows of one product, so that keys and values are not repeated and their gradients
    need no sum.
    """
    out: Tensor
    if supports(q, k, v, lanes=NATIVE_LANES) and q.shape[3] == v.shape[3]:
        tokens = (x.transpose(1, 2) for x in (q, k, v))
        out = FusedAttention.apply(*tokens, tuple(lengths), scale)  # type: ignore[no-untyped-call]
    else:
        out = _ShortAttention.apply(q, k, v, tuple(blocks(lengths)), scale)  # type: ignore[no-untyped-call]
    return out


class FusedAttention(torch.autograd.Function):
    """The same by native.c, (B, T, H, K) of q (B, T, H, K), k and v (B, T, G, K), without weights kept for backward.

    Of SmolLM2-135M's shapes, 8 sequences with 640 tokens, forward and backward take 2.7 instead of 5.0 ms.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], scale: float) -> Tensor:
        q, k, v = (_strided(x) for x in (q, k, v))
        B, T, H, K = q.shape
        starts = _starts(lengths * B)
        ctx.shape = AttentionShape(
            *(x.stride(n) for x in (q, k, v) for n in (1, 2)), len(starts) - 1, H, k.shape[2], K, scale
        )
        out, log_sums = q.new_empty(q.shape), q.new_empty(B, T, H, dtype=torch.float32)
        tensors = (q, k, v, out, log_sums, starts)
        _refuse_failure(native().attention_forward(*(x.data_ptr() for x in tensors), addressof(ctx.shape)))
        ctx.save_for_backward(*tensors)
        return out

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_sums, starts = ctx.saved_tensors
        grads = [x.new_empty(x.shape) for x in (q, k, v)]
        tensors = (outputs[0].contiguous(), q, k, v, out, log_sums, *grads, starts)
        _refuse_failure(native().attention_backward(*(x.data_ptr() for x in tensors), addressof(ctx.shape)))
        return *grads, None, None


def _strided(x: Tensor) -> Tensor:
    """x (B, T, heads, K) with its tokens at one distance in all rows, and a head's numbers side by side."""
    return x if x.stride(3) == 1 and (len(x) == 1 or x.stride(0) == x.shape[1] * x.stride(1)) else x.contiguous()


@lru_cache(maxsize=1)
def _starts(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)])


def _refuse_failure(failed: int) -> None:
    if failed:
        raise MemoryError("attention: the buffers of a sequence do not fit in memory")


class QueryBlock(NamedTuple):
    """Queries start:stop and keys first:stop; a query sees the keys of its own sequence that are not later."""

    first: int
    start: int
    stop: int
    lengths: tuple[int, ...]  # of the sequences in first:stop

    @property
    def weights(self) -> int:
        """Number of attention weights per head."""
        return (self.stop - self.start) * (self.stop - self.first)


def blocks(lengths: Sequence[int]) -> Iterator[QueryBlock]:
    """In order: neighbours with at most BLOCK tokens in total share a block, a longer sequence has several.

    Small products cost by their number, not by their size, so short sequences share one; a long sequence is split so
    that few masked scores are computed.
    """
    first, run = 0, list[int]()
    for length in [*lengths, BLOCK + 1]:  # the last one ends the last run
        if run and sum(run) + length > BLOCK:
            stop = first + sum(run)
            for start in range(first, stop, BLOCK):
                end = min(start + BLOCK, stop)
                yield QueryBlock(first, start, end, tuple(run) if len(run) > 1 else (end - first,))
            first, run = stop, []
        run.append(length)


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, parts: tuple[QueryBlock, ...], scale: float) -> Tensor:
        B, H, T, K = q.shape
        G = k.shape[1]
        # cached for real tensors only: under FakeTensorMode the masks are fake
        masks = (_cached_masks if type(q) is Tensor else _masks)(parts, H // G, q.dtype)
        out, kept = q.new_empty(B, T, H, K), list[Tensor]()
        for part, mask in zip(parts, masks, strict=True):
            rows, keys, values = _rows(q, part, G), _keys(k, part), _keys(v, part)  # (BG, R·t, K), (BG, s, K) twice
            weights = torch.baddbmm(mask, rows, keys.transpose(1, 2), alpha=scale).softmax(-1)  # (BG, R·t, s)
            kept += [rows, weights]
            out[:, part.start : part.stop] = _tokens(torch.bmm(weights, values), B, H)  # (B, t, H, K)
        ctx.save_for_backward(k, v, *kept)
        ctx.parts, ctx.scale = parts, scale
        return out

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        """dV = PᵀdO; dS = P ∘ (dP − rows' sums of P ∘ dP) with dP = dO Vᵀ; dQ = dS K; dK = dSᵀ Q."""
        k, v, *kept = ctx.saved_tensors
        d_q = torch.empty_like(outputs[0])  # (B, T, H, K): the layout that the projections' backward reads
        d_k, d_v = (torch.zeros_like(x.transpose(1, 2)) for x in (k, v))  # (B, T, G, K)
        d_out = outputs[0].transpose(1, 2)  # (B, H, T, K)
        B, H, _, _ = d_out.shape
        G = k.shape[1]
        for part, rows, weights in zip(ctx.parts, kept[::2], kept[1::2], strict=True):
            d_rows, keys, values = _rows(d_out, part, G), _keys(k, part), _keys(v, part)
            d_weights = torch.bmm(d_rows, values.transpose(1, 2))  # (BG, R·t, s)
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, weights.dtype).mul_(ctx.scale)
            del d_weights  # as large as the block's scores
            # added: the blocks of one long sequence share its first keys
            d_v[:, part.first : part.stop] += _tokens(torch.bmm(weights.transpose(1, 2), d_rows), B, G)
            d_k[:, part.first : part.stop] += _tokens(torch.bmm(d_scores.transpose(1, 2), rows), B, G)
            d_q[:, part.start : part.stop] = _tokens(torch.bmm(d_scores, keys), B, H)
            del d_scores
        return d_q.transpose(1, 2), d_k.transpose(1, 2), d_v.transpose(1, 2), None, None


def _rows(x: Tensor, part: QueryBlock, groups: int) -> Tensor:
    """The block's queries as rows of their group: (B, H, T, K) → (BG, R·t, K)."""
    B, H, _, K = x.shape
    t = part.stop - part.start
    return x[:, :, part.start : part.stop].reshape(B * groups, H // groups * t, K)


def _keys(x: Tensor, part: QueryBlock) -> Tensor:
    """The block's keys, or their values: (B, G, T, K) → (BG, s, K)."""
    return x[:, :, part.first : part.stop].flatten(0, 1)


def _tokens(x: Tensor, rows: int, heads: int) -> Tensor:
    """(B, t, heads, K) from a product's rows."""
    return x.view(rows, heads, -1, x.shape[-1]).transpose(1, 2)


def _masks(parts: tuple[QueryBlock, ...], repeats: int, dtype: torch.dtype) -> list[Tensor]:
    """For each block (1, R·t, s): 0 where a query sees a key, else −∞."""
    masks = []
    for part in parts:
        count, lengths = len(part.lengths), torch.tensor(part.lengths)
        sequence = torch.arange(count).repeat_interleave(lengths, output_size=part.stop - part.first)  # (s,)
        visible = (sequence[:, None] == sequence).tril_()[part.start - part.first :]  # (t, s)
        mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -torch.inf)
        masks.append(mask.repeat(1, repeats, 1))
    return masks


_cached_masks = lru_cache(maxsize=1)(_masks)  # all layers of a step use the same
