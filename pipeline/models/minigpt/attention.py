"""MiniGPT's attention and its KV cache. Dimensions are those of `model.py`."""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.base import Prefix

PACK_UP_TO = 128  # tokens; a longer packed row computes attention sequence by sequence, a shorter one under one mask


class KVCache:
    """Keys and values of the tokens seen so far: per layer two tensors (B, H, S, K)."""

    def __init__(self) -> None:
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        return self._layers[0][0].shape[2] if self._layers else 0

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        return self._layers[layer]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self._layers:
            old_k, old_v = self._layers[layer]
            k, v = torch.cat((old_k, k), dim=2), torch.cat((old_v, v), dim=2)
        self._layers[layer] = (k, v)
        return k, v


class Attention(nn.Module):
    """softmax(QKᵀ/√K + causal mask) V, per head, then the output projection (the document's §2.1)."""

    def __init__(self, d_model: int, heads: int, layer: int) -> None:
        super().__init__()
        self.layer, self.n_heads, self.head_size = layer, heads, d_model // heads
        self.k_proj = nn.Linear(d_model, d_model)
        self.v_proj = nn.Linear(d_model, d_model)
        self.q_proj = nn.Linear(d_model, d_model)
        self.out_proj = nn.Linear(d_model, d_model)

    def forward(
        self, x: Tensor, cache: KVCache | None, segments: Sequence[int] | None, prefix: Prefix | None = None
    ) -> Tensor:
        B, T, D = x.shape
        H, K = self.n_heads, self.head_size
        q = self.q_proj(x).view(B, T, H, K).transpose(1, 2)  # (B, H, T, K)
        k = self.k_proj(x).view(B, T, H, K).transpose(1, 2)
        v = self.v_proj(x).view(B, T, H, K).transpose(1, 2)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)  # (B, H, S, K)
        if prefix is not None:
            k, v = prefix(self.layer, k, v, segments or [T])
        if segments is None:
            y = _causal_attention(q, k, v)
        elif k.shape[2] == T <= PACK_UP_TO:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=_segment_mask(tuple(segments), x.dtype, x.device))
        else:
            spans = [length + (k.shape[2] - T) // len(segments) for length in segments]  # with each prefix's keys
            parts = zip(q.split(list(segments), dim=2), k.split(spans, dim=2), v.split(spans, dim=2), strict=True)
            y = torch.cat([_causal_attention(*part) for part in parts], dim=2)  # (B, H, T, K)
        out: Tensor = self.out_proj(y.transpose(1, 2).reshape(B, T, D))
        return out


@lru_cache(maxsize=16)  # all layers of a step use the same mask
def _segment_mask(segments: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(T, T): 0 where a token sees a token of its own sequence up to itself, else −∞."""
    sequence = torch.arange(len(segments)).repeat_interleave(torch.tensor(segments))  # (T,): each token's sequence
    visible = (sequence[:, None] == sequence).tril()
    return torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill(~visible.to(device), -torch.inf)


def _causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, H, T, K); query t sees the first S - T keys, which precede the T tokens, and those of tokens 0 to t."""
    T, S = q.shape[2], k.shape[2]
    if S == T:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    seen = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
