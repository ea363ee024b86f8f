"""What a token attends to, computed from a layer's own queries and keys."""

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

    S is T, or more by a prefix's keys, which come first.
    """
    B, T, _ = x.shape
    H, K = attention.n_heads, attention.head_size
    q = attention.q_proj(x).view(B, T, H, K).transpose(1, 2)  # (B, H, T, K)
    k = attention.k_proj(x).view(B, T, H, K).transpose(1, 2)
    if prefix is not None:
        k, _ = prefix(attention.layer, k, k, [T])
    S = k.shape[2]
    later = torch.ones(T, S, dtype=torch.bool, device=x.device).triu(1 + S - T)
    scores = (q @ k.transpose(2, 3) / math.sqrt(K)).masked_fill(later, -torch.inf)  # (B, H, T, S)
    weights: Tensor = scores.softmax(-1)
    return weights


@torch.no_grad()
def of_layer(model: CausalLM, ids: Tensor, layer: int) -> Tensor:
    """The attention probabilities, (B, H, T, T), of one layer while the model reads ids (B, T).

    Virtual tokens come first, a prefix's as columns alone: only its keys and values are there.
    """
    attention = getattr(model.blocks[layer], "self_attn", None)
    if not isinstance(attention, Attention):
        with record_weights(layer) as found:
            model.hidden_states(ids)
        if not found:
            raise UserError(f"Layer {layer} attends in a way of its own, or not at all: it cannot be shown.")
        return found[-1]  # the first time a model may try out what it is able to
    inputs: list[tuple[Any, ...]] = []
    hook = attention.register_forward_pre_hook(lambda _, args: inputs.append(args))
    try:
        model.hidden_states(ids)
    finally:
        hook.remove()
    x, _cache, _segments, prefix = inputs[-1]
    return probabilities(attention, x, prefix)


def with_virtual_as_one(weights: Tensor, tokens: int) -> Tensor:
    """(T + 1, T + 1) for a head's weights whose last T = `tokens` rows and columns are those of words.

    The first row and column stand for all virtual tokens together: what is not spent on words is spent on them.
    """
    words = weights[-tokens:]  # (T, n + T)
    found = weights.new_zeros(tokens + 1, tokens + 1)
    found[0, 0] = 1
    found[1:, 0] = words[:, :-tokens].sum(-1)
    found[1:, 1:] = words[:, -tokens:]
    return found
