"""Attention of transformers' models: causal, and within each sequence of a packed row.

B batch (1 if `segments` packs sequences into one row), T queries, S keys, K head size, H query heads, of which R = H/G
share each of the G key and value heads. There is no dropout: a run gives the same numbers when it is repeated.

Short sequences on the CPU train with plain batched matrix products (`short_attention`): the flash kernel's backward
spends its time outside the products there. A LoRA step of SmolLM2-135M in bf16, 8 sequences of 12 to 300 tokens, takes
1/1.2 of the time (measured on two cores, in turns with torch's flash attention).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.base import PackedCache, Prefix
from pipeline.models.kernels import uses_cpu_kernels

NAME = "lora_segments"
# Tokens of a short sequence; beyond it the weights kept for backward, T² per head, cost more than they save.
LONGEST = 512
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
            weights.append(_weights(query, key, rule))

    # Also in training without gradients: with its adapter off, a model then gives the bits that its base gives.
    short = module.training and uses_cpu_kernels(query.device) and lengths == spans and max(lengths) <= LONGEST
    if short and not rule.explicit and rule.window is None:
        out = short_attention(query, key, value, lengths, rule.scale)
    elif len(lengths) == 1 and pairs is None:
        out = _row(query, key, value, rule).transpose(1, 2)
    elif _supports_varlen(query, rule):
        if pairs is not None:
            key, value = (torch.cat(each, 2) for each in zip(*pairs, strict=True))
        out = _varlen(query, key, value, lengths, spans, rule)
    else:
        if pairs is None:
            pairs = [*zip(key.split_with_sizes(spans, 2), value.split_with_sizes(spans, 2), strict=True)]
        each_query = zip(query.split_with_sizes(lengths, 2), pairs, strict=True)
        out = torch.cat([_row(q, *pair, rule).transpose(1, 2) for q, pair in each_query], 1)  # (1, T, H, K)
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


def _supports_varlen(q: Tensor, rule: Rule) -> bool:
    """Whether torch's varlen flash attention applies: 16 bits, an Ampere GPU or later."""
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16) or rule.explicit:
        return False
    # the head sizes that flash attention has kernels for
    return q.shape[3] <= 256 and q.shape[3] % 8 == 0 and torch.cuda.get_device_capability(q.device) >= (8, 0)


def _varlen(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], spans: list[int], rule: Rule) -> Tensor:
    """(1, T, H, K), all sequences in one call: on a GPU a call for each would cost more than the attention."""
    from torch.nn.attention.varlen import varlen_attn

    q_starts, k_starts = (torch.tensor([0, *sizes]).cumsum(0).to(q.device, torch.int32) for sizes in (lengths, spans))
    window = (-1 if rule.window is None else rule.window - 1, 0)
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))  # (T, H, K) and (S, G, K)
    longest, shared = (max(lengths), max(spans)), q.shape[1] != k.shape[1]
    out = varlen_attn(q, k, v, q_starts, k_starts, *longest, scale=rule.scale, window_size=window, enable_gqa=shared)
    assert isinstance(out, Tensor)
    return out[None]  # (1, T, H, K)


def _row(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    """(B, H, T, K), each row one sequence."""
    B, H, T, K = q.shape
    G, S = k.shape[1:3]
    if rule.explicit:  # explicit scores, so that they can be capped and extended by sinks
        weights = _weights(q, k, rule).to(q.dtype).view(B, G, H // G, T, S)
        return (weights @ v.unsqueeze(2)).flatten(1, 2)  # (B, G, R, T, K) → (B, H, T, K)
    plain = (T == S or T == 1) and (rule.window is None or rule.window >= S)
    if plain and T == 1:
        # A group's R heads take the place of tokens, so that no kernel repeats keys and values: 2 × as fast as torch's
        # enable_gqa after 32 tokens, 5 × after 256 (measured on the CPU with SmolLM2's 9 heads in 3 groups, bf16).
        grouped = q.view(B, G, H // G, K)  # (B, G, R, K)
        return F.scaled_dot_product_attention(grouped, k, v, scale=rule.scale).view(q.shape)
    mask = None if plain else _visible(T, S, rule.window, q.device)
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=plain, scale=rule.scale, enable_gqa=H != G)


def _weights(q: Tensor, k: Tensor, rule: Rule) -> Tensor:
    """softmax of the scores as `rule` says, causal, (B, H, T, S) in fp32; row t is token t's."""
    B, H, T, _ = q.shape
    G, S = k.shape[1:3]
    grouped = q.reshape(B, G, H // G, T, -1)  # (B, G, R, T, K)
    scores = grouped @ k.unsqueeze(2).transpose(3, 4) * rule.scale  # (B, G, R, T, S)
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    scores = scores.float().masked_fill(~_visible(T, S, rule.window, q.device), -torch.inf)
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
    out: Tensor = _ShortAttention.apply(q, k, v, tuple(blocks(lengths)), scale)  # type: ignore[no-untyped-call]
    return out


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
