"""Attention of packed sequences by `flash-attn` where it is installed (Dao 2023, arXiv 2307.08691).

It has what torch's own kernel for sequences of different lengths lacks: capped scores (Gemma 2),
and windows in every version of torch. It needs a CUDA build of its own, which no extra of this
project installs.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from torch import Tensor

from pipeline.models.kernels import suits_flash_attention
from pipeline.models.kernels.plain_attention import Rule, sequence_starts


def supports_flash(q: Tensor, v: Tensor) -> bool:
    """Whether flash-attn is installed and takes q and v (B, heads, tokens, K). It has no sinks."""
    return q.is_cuda and suits_flash_attention(q, v) and _flash_attention() is not None


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], spans: Sequence[int], rule: Rule
) -> Tensor:
    """(B, T, H, K) for q (B, H, T, K), k and v (B, G, S, K), as `rule` says.

    Each row holds sequences of `lengths` queries and `spans` keys. In a sequence, query t of T sees
    key S - T + t and the window before that key. A second call gives the same gradients.
    """
    B, H, T, K = q.shape
    q_starts, k_starts = (sequence_starts((*sizes,) * B, q.device) for sizes in (lengths, spans))
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B·T, H, K) and (B·S, G, K)
    function = _flash_attention()
    assert function is not None
    out: Tensor = function(
        q,
        k,
        v,
        q_starts,
        k_starts,
        max(lengths),
        max(spans),
        softmax_scale=rule.scale,
        causal=True,
        window_size=(-1 if rule.window is None else rule.window - 1, 0),
        softcap=rule.softcap or 0.0,
        deterministic=True,  # its backward otherwise adds in the order in which blocks end
    )
    return out.view(B, T, H, K)


@cache
def _flash_attention() -> Callable[..., Any] | None:
    try:
        from flash_attn import flash_attn_varlen_func
    except (ImportError, OSError):  # not installed, or built for another torch
        return None
    function: Callable[..., Any] = flash_attn_varlen_func
    return function
