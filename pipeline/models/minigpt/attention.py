"""MiniGPT's attention, and what it has seen. Dimensions are those of `minigpt.py`."""

from collections.abc import Sequence
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.models.virtual_tokens import Prefix, with_prefix

JOINED = 128  # tokens of one row up to which sequences in it share a product of attention, each seeing itself alone


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
            k, v = with_prefix(prefix(self.layer), k, v, segments or [T])
        if segments is None:
            y = _attended(q, k, v)
        elif k.shape[2] == T <= JOINED:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=_apart(tuple(segments), x.dtype, x.device))
        else:
            spans = [length + (k.shape[2] - T) // len(segments) for length in segments]
            parts = zip(q.split(list(segments), dim=2), k.split(spans, dim=2), v.split(spans, dim=2), strict=True)
            y = torch.cat([_attended(*part) for part in parts], dim=2)
        out: Tensor = self.out_proj(y.transpose(1, 2).reshape(B, T, D))
        return out


@lru_cache(maxsize=16)  # all layers of a step have the same
def _apart(segments: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(T, T), for sequences end to end: 0 where a token sees an earlier one of its own or itself, else −∞."""
    of = torch.arange(len(segments)).repeat_interleave(torch.tensor(segments))  # each token's sequence
    own = (of[:, None] == of).tril()
    return torch.zeros(own.shape, dtype=dtype, device=device).masked_fill(~own.to(device), -torch.inf)


def _attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, H, T, K); of S keys, query t sees the S - T before the sequence's own and these up to itself."""
    T, S = q.shape[2], k.shape[2]
    if S == T:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    seen = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
