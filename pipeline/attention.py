"""What a token attends to, computed from a layer's own queries and keys."""

import math

import torch
from torch import Tensor

from pipeline.errors import UserError
from pipeline.models.attend import watched
from pipeline.models.causal import CausalLM
from pipeline.models.minigpt import Attention


def probabilities(attention: Attention, x: Tensor) -> Tensor:
    """softmax(QKᵀ/√K + causal mask), (B, H, T, T), for the layer's inputs x (B, T, D); row t is token t's (§2.1)."""
    B, T, _ = x.shape
    H, K = attention.n_heads, attention.head_size
    q = attention.q_proj(x).view(B, T, H, K).transpose(1, 2)  # (B, H, T, K)
    k = attention.k_proj(x).view(B, T, H, K).transpose(1, 2)
    later = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
    scores = (q @ k.transpose(2, 3) / math.sqrt(K)).masked_fill(later, -torch.inf)  # (B, H, T, T)
    weights: Tensor = scores.softmax(-1)
    return weights


@torch.no_grad()
def of_layer(model: CausalLM, ids: Tensor, layer: int) -> Tensor:
    """The attention probabilities, (B, H, T, T), of one layer while the model reads ids (B, T)."""
    attention = getattr(model.blocks[layer], "self_attn", None)
    if not isinstance(attention, Attention):
        with watched(layer) as found:
            model.hidden(ids)
        if not found:
            raise UserError(f"Layer {layer} attends in a way of its own, or not at all: it cannot be shown.")
        return found[0]
    inputs: list[Tensor] = []
    hook = attention.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    try:
        model.hidden(ids)
    finally:
        hook.remove()
    return probabilities(attention, inputs[0])
