"""Attention of transformers' models: causal, and within each sequence of a packed row.

B batch (1 if `segments` packs sequences into one row), T queries, S keys, K head size, H query heads, of which R = H/G
share each of the G key and value heads.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.base import Prefix
from pipeline.models.kernels import short_attention

NAME = "lora_segments"


@dataclass(frozen=True)
class Rule:
    """How scores become weights, apart from the causal mask."""

    scale: float
    window: int | None = None  # keys that a query sees, its own included
    softcap: float | None = None
    sinks: Tensor | None = None  # (H,): one more score per head, whose weight goes to no value
    dropout: float = 0.0

    @property
    def explicit(self) -> bool:
        """Whether the scores themselves must be changed, which fused attention cannot do."""
        return self.softcap is not None or self.sinks is not None


def register() -> str:
    """The name to pass to transformers as `attn_implementation`. Such a model passes no masks."""
    from transformers import AttentionInterface  # takes two seconds, which MiniGPT does not need

    AttentionInterface.register(NAME, attend)
    return NAME


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Sequence[int] | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    prefix: Prefix | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """softmax(QKᵀ·scaling + causal mask)·V, (B, T, H, K), for query (B, H, T, K), key and value (B, G, S, K).

    segments: lengths, T in total, of the sequences in the one row; None: every row is one sequence, and with more keys
    than queries (a cache) query t has position S - T + t. prefix: adds keys and values before those of each sequence.
    Raises ValueError for a mask: rows here have no padding.
    """
    if attention_mask is not None:
        raise ValueError("this attention takes no mask: pack sequences end to end and pass their lengths as segments")
    lengths = [query.shape[2]] if segments is None else list(segments)
    spans = [key.shape[2]] if segments is None else lengths  # lengths of keys
    if prefix is not None:
        own_keys = key.shape[2]
        key, value = prefix(module.layer_idx, key, value, spans)  # type: ignore[arg-type]
        added = (key.shape[2] - own_keys) // len(spans)
        spans = [added + span for span in spans]
    longest = max(spans)
    window = None if sliding_window is None or sliding_window >= longest else sliding_window
    rule = Rule(query.shape[3] ** -0.5 if scaling is None else scaling, window, softcap, s_aux, dropout)
    if segments is not None and (query.shape[0] != 1 or sum(segments) != query.shape[2]):
        raise ValueError(f"segments {list(segments)} do not add up to one row of {query.shape[2]} tokens")
    for layer, weights in _recorders:
        if getattr(module, "layer_idx", None) == layer:
            weights.append(_weights(query, key, rule))
    return _attention(query, key, value, rule, lengths, spans, module.training).contiguous(), None


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


def _attention(
    q: Tensor, k: Tensor, v: Tensor, rule: Rule, lengths: list[int], spans: list[int], training: bool
) -> Tensor:
    """(B, T, H, K); `lengths` are those of the sequences' queries, `spans` those of their keys."""
    if training and lengths == spans and _is_short(q, rule, max(lengths)):
        return short_attention.packed(q, k, v, lengths, rule.scale)
    if len(lengths) == 1:
        return _row(q, k, v, rule).transpose(1, 2)
    if _supports_varlen(q, rule):
        return _varlen(q, k, v, lengths, spans, rule)
    queries, keys, values = (x.split_with_sizes(n, 2) for x, n in ((q, lengths), (k, spans), (v, spans)))
    sequences = zip(queries, keys, values, strict=True)
    return torch.cat([_row(*qkv, rule).transpose(1, 2) for qkv in sequences], 1)  # (1, T, H, K)


def _is_short(q: Tensor, rule: Rule, longest: int) -> bool:
    """Whether `short_attention` applies. In training also without gradients: with its adapter off, a model then gives
    the bits that its base gives."""
    plain = not rule.explicit and rule.window is None and not rule.dropout
    return plain and q.device.type == "cpu" and longest <= short_attention.LONGEST


def _supports_varlen(q: Tensor, rule: Rule) -> bool:
    """Whether torch's varlen flash attention applies: 16 bits, an Ampere GPU or later."""
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16) or rule.explicit or rule.dropout:
        return False
    return q.shape[3] <= 256 and q.shape[3] % 8 == 0 and torch.cuda.get_device_capability(q.device) >= (8, 0)


def _varlen(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], spans: list[int], rule: Rule) -> Tensor:
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
    if rule.explicit:
        return _explicit_attention(q, k, v, rule)
    T, S = q.shape[2], k.shape[2]
    plain = (T == S or T == 1) and (rule.window is None or rule.window >= S)
    if plain and T == 1:  # a group's R heads take the place of tokens, so that no kernel repeats keys and values
        grouped = q.view(q.shape[0], k.shape[1], -1, q.shape[3])  # (B, G, R, K)
        return F.scaled_dot_product_attention(grouped, k, v, None, rule.dropout, scale=rule.scale).view(q.shape)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        None if plain else _visible(T, S, rule.window, q.device),
        rule.dropout,
        is_causal=plain,
        scale=rule.scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _explicit_attention(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    """`_row` with explicit scores, so that they can be capped and extended by sinks."""
    B, H, T, _ = q.shape
    G = k.shape[1]
    weights = F.dropout(_weights(q, k, rule).to(q.dtype), rule.dropout).view(B, G, H // G, T, -1)
    return (weights @ v.unsqueeze(2)).flatten(1, 2)


def _weights(q: Tensor, k: Tensor, rule: Rule) -> Tensor:
    """(B, H, T, S), in fp32."""
    B, H, T, _ = q.shape
    G, S = k.shape[1:3]
    grouped = q.reshape(B, G, H // G, T, -1)  # (B, G, R, T, K)
    scores = grouped @ k.unsqueeze(2).transpose(3, 4) * rule.scale  # (B, G, R, T, S)
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    scores = scores.float().masked_fill(~_visible(T, S, rule.window, q.device), -torch.inf)
    if rule.sinks is not None:
        sinks = rule.sinks.float().view(1, G, H // G, 1, 1).expand(B, -1, -1, T, 1)
        scores = torch.cat([scores, sinks], -1)
    return scores.softmax(-1)[..., :S].flatten(1, 2)


def _visible(T: int, S: int, window: int | None, device: torch.device) -> Tensor:
    """(T, S), True where a query sees a key."""
    visible = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
    return visible if window is None else visible.triu(S - T - window + 1)
