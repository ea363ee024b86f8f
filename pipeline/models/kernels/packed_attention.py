"""Attention of transformers' models: causal, and within each sequence of a packed row.

There is no dropout: a run gives the same numbers when it is repeated. Shapes as in
plain_attention.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from pipeline.models.base import Prefix
from pipeline.models.kernels import uses_cpu_kernels
from pipeline.models.kernels.plain_attention import (
    Rule,
    attend_each,
    attend_row,
    split_sequences,
)
from pipeline.models.kernels.short_attention import LONGEST, short_attention
from pipeline.models.pages import PackedCache

NAME = "lora_segments"


def register(function: Callable[..., Any] | None = None) -> str:
    """Register our attention with transformers; returns its name, an `attn_implementation`.

    A model that uses it passes no masks. `function`: what stands in for `attend`.
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
    """softmax(QKᵀ·scaling + causal mask)·V, (B, T, H, K).

    `query` is (B, H, T, K), `key` and `value` are (B, G, S, K).

    segments: lengths, T in total, of the sequences in the one row; None: every row is one sequence,
    and with more keys than queries (a cache) query t has position S - T + t. prefix: adds keys and
    values before those of each sequence. past: holds those that came before in each sequence, and
    takes the new ones. Raises ValueError for a mask: rows here have no padding.
    """
    if attention_mask is not None:
        raise ValueError(
            "this attention takes no mask: pack sequences end to end and pass their lengths as "
            "segments"
        )
    if segments is not None and (query.shape[0] != 1 or sum(segments) != query.shape[2]):
        raise ValueError(
            f"segments {list(segments)} do not add up to one row of {query.shape[2]} tokens"
        )
    T = query.shape[2]
    pages = None  # of the cache
    lengths = [T] if segments is None else list(segments)
    if prefix is not None:
        key, value = prefix(module.layer_idx, key, value, lengths)  # type: ignore[arg-type]
    # each sequence's number of keys
    spans = [length + (key.shape[2] - T) // len(lengths) for length in lengths]
    if past is not None:
        pages = past.append(module.layer_idx, key, value)  # type: ignore[arg-type]
        spans = past.spans
    if sliding_window is not None and sliding_window >= max(spans):
        sliding_window = None  # it hides no key, and most kernels have only a causal mask
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    rule = Rule(scale, sliding_window, softcap, s_aux)
    if not uses_cpu_kernels(query.device):
        # not loaded on a CPU
        from pipeline.models.kernels.accelerator_attention import attend_on_accelerator

        out = attend_on_accelerator(query, key, value, lengths, spans, rule, pages)
    # In training also without gradients: a model whose adapter is off then gives the bits of its
    # base.
    elif module.training and rule.plain and lengths == spans and max(lengths) <= LONGEST:
        out = short_attention(query, key, value, lengths, rule.scale)
    elif len(lengths) == 1 and pages is None:
        out = attend_row(query, key, value, rule).transpose(1, 2)
    else:
        pairs = split_sequences(key, value, spans) if pages is None else pages.pairs()
        out = attend_each(query, pairs, lengths, rule)
    return out.contiguous(), None
