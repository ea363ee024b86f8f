"""Attention weights of a layer, computed from its queries and keys."""

import math
from typing import Any

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.models.base import CausalLM, Prefix
from pipeline.models.kernels.packed_attention import record_weights
from pipeline.models.minigpt.attention import Attention


def probabilities(attention: Attention, x: Tensor, prefix: Prefix | None = None) -> Tensor:
    """softmax(QKᵀ/√K + causal mask), (B, H, T, S), for the layer's inputs x (B, T, D); row t is token t's (§2.1).

    S is T, plus the length of the prefix, whose keys come first.
    """
    B, T, _ = x.shape
    H, K = attention.n_heads, attention.head_size
    q = attention.q_proj(x).view(B, T, H, K).transpose(1, 2)  # (B, H, T, K)
    k = attention.k_proj(x).view(B, T, H, K).transpose(1, 2)  # (B, H, S, K) with the prefix
    if prefix is not None:
        k, _ = prefix(attention.layer, k, k, [T])
    S = k.shape[2]
    later = torch.ones(T, S, dtype=torch.bool, device=x.device).triu(1 + S - T)
    scores = (q @ k.transpose(2, 3) / math.sqrt(K)).masked_fill(later, -torch.inf)  # (B, H, T, S)
    weights: Tensor = scores.softmax(-1)
    return weights


@torch.no_grad()
def layer_attention(model: CausalLM, ids: Tensor, layer: int) -> Tensor:
    """Attention weights (B, H, T, S) of one layer for ids (B, T).

    Virtual tokens come first: prompt tuning's are rows and columns, a prefix's only columns, as it has no queries.
    Raises UserError if the layer has no attention that can be shown.
    """
    attention = getattr(model.blocks[layer], "self_attn", None)
    if not isinstance(attention, Attention):
        with record_weights(layer) as weights:
            model.hidden_states(ids)
        if not weights:
            raise UserError(f"Layer {layer} has no standard attention, so there are no weights to show.")
        return weights[-1]  # earlier entries are from a first forward that probes what the model supports
    inputs: list[tuple[Any, ...]] = []
    hook = attention.register_forward_pre_hook(lambda _, args: inputs.append(args))
    try:
        model.hidden_states(ids)
    finally:
        hook.remove()
    x, _cache, _segments, prefix = inputs[-1]
    return probabilities(attention, x, prefix)


def merge_virtual_tokens(weights: Tensor, tokens: int) -> Tensor:
    """A head's weights (n + T, n + T) or (T, n + T) as (T + 1, T + 1), for T = `tokens` words after n virtual tokens.

    The first row and column stand for all virtual tokens together, so each row still sums to 1.
    """
    words = weights[-tokens:]  # (T, n + T)
    merged = weights.new_zeros(tokens + 1, tokens + 1)
    merged[0, 0] = 1
    merged[1:, 0] = words[:, :-tokens].sum(-1)
    merged[1:, 1:] = words[:, -tokens:]
    return merged
