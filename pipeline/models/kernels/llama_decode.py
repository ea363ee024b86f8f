"""A Llama-shaped block for the one token that generation adds, with a third of the calls of the general block."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Map = Callable[[Tensor], Tensor]
NORMS = {"input_layernorm", "post_attention_layernorm"}
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
FEED_FORWARD = {"gate_proj", "up_proj", "down_proj", "act_fn"}


def has_llama_parts(block: nn.Module) -> bool:
    """Whether the block has exactly Llama's parts, with or without norms of queries and keys.

    It may still combine them differently: compare the outputs.
    """
    if _child_names(block) != {"self_attn", "mlp"} | NORMS:
        return False
    attention: Any = block.self_attn
    extra = list(attention.parameters(recurse=False)) or getattr(attention, "sliding_window", None)
    same_parts = _child_names(attention) in (PROJECTIONS, PROJECTIONS | {"q_norm", "k_norm"})
    return not extra and same_parts and _child_names(block.mlp) == FEED_FORWARD


def _child_names(module: Any) -> set[str]:
    return {name for name, _ in module.named_children()}


class OneTokenBlock:
    """Replaces the forward of `block`: (1, 1, D) → (1, 1, D) after a cache; other inputs go to the block's own forward.

    `pack` makes one map of linears with the same x, its outputs concatenated, or returns None; `packed` are the linears
    it has packed. K is the head size; G groups of R query heads share a key and a value head.
    """

    def __init__(self, block: Any, pack: Callable[[Sequence[nn.Module]], Map | None]) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.layer, self.scale, self.K = attention.layer_idx, attention.scaling, attention.head_dim
        self.R = attention.num_key_value_groups
        self.norm, self.feed_norm, self.act = block.input_layernorm, block.post_attention_layernorm, mlp.act_fn
        self.head_norms = [attention.q_norm, attention.k_norm] if hasattr(attention, "q_norm") else []
        self._pack, self.packed = pack, list[nn.Module]()
        self.qkv = self._concatenate(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out, self.down = self._concatenate(attention.o_proj), self._concatenate(mlp.down_proj)
        self.gate_up = self._concatenate(mlp.gate_proj, mlp.up_proj)

    def _concatenate(self, *modules: nn.Module) -> Map:
        packed = self._pack(modules)
        self.packed += modules if packed else ()
        return packed or (lambda x: torch.cat([module(x) for module in modules], -1))

    def __call__(self, block: nn.Module, x: Tensor, *others: Any, cache: Any = None, **options: Any) -> Tensor:
        if x.shape[:2] != (1, 1) or cache is None:
            out: Tensor = type(block).forward(block, x, *others, cache=cache, **options)
            return out
        x = x + self.out(self._attention(self.qkv(self.norm(x)), options["position_embeddings"], cache))
        gate, up = self.gate_up(self.feed_norm(x)).chunk(2, -1)
        return x + self.down(self.act(gate) * up)

    def _attention(self, qkv: Tensor, rotary: tuple[Tensor, Tensor], cache: Any) -> Tensor:
        """(1, 1, H·K) for qkv (1, 1, (H + 2G)·K); rotary: cosines and sines of the token's position, (1, 1, K) each."""
        cos, sin = rotary
        heads = qkv.view(-1, self.K)  # (GR + 2G, K)
        G = len(heads) // (self.R + 2)
        qk, v = heads[:-G], heads[-G:]  # (GR + G, K), (G, K)
        if self.head_norms:
            parts = zip(self.head_norms, qk.split([G * self.R, G]), strict=True)  # type: ignore[no-untyped-call]
            qk = torch.cat([norm(part) for norm, part in parts])
        half = self.K // 2
        signed_sin = torch.cat((-sin[0, :, :half], sin[0, :, half:]), -1)
        qk = qk * cos[0] + qk.roll(half, -1) * signed_sin  # Su et al. 2021, §3.4.2, with pairs (i, i + K/2)
        keys, values = cache.update(qk[None, -G:, None], v[None, :, None], self.layer)  # (1, G, S, K)
        q = qk[:-G].view(1, G, self.R, self.K)  # a group's R heads stand where tokens do
        return F.scaled_dot_product_attention(q, keys, values, scale=self.scale).view(1, 1, -1)
