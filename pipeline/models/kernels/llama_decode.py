"""A Llama-shaped block for the one token that generation adds, in a third of the calls that the general one needs."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Map = Callable[[Tensor], Tensor]
NORMS = {"input_layernorm", "post_attention_layernorm"}
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
FEED_FORWARD = {"gate_proj", "up_proj", "down_proj", "act_fn"}


def fits(block: nn.Module) -> bool:
    """Whether the block has Llama's parts and none beside them, norms of the heads excepted.

    Whether they are put together as Llama's are is for numbers to say.
    """
    if _parts(block) != {"self_attn", "mlp"} | NORMS:
        return False
    attention: Any = block.self_attn
    own = list(attention.parameters(recurse=False)) or getattr(attention, "sliding_window", None)
    known = _parts(attention) in (PROJECTIONS, PROJECTIONS | {"q_norm", "k_norm"})
    return not own and known and _parts(block.mlp) == FEED_FORWARD


def _parts(module: Any) -> set[str]:
    return {name for name, _ in module.named_children()}


class OneToken:
    """Called as forward of `block`: (1, 1, D) → (1, 1, D) after a cache; all else goes to the block's own forward.

    pack: linears that read the same x → one map to their outputs, end to end, or None if it cannot; `joined` are those
    that it took. K is the head size; G groups of R query heads share a key and a value head.
    """

    def __init__(self, block: Any, pack: Callable[[Sequence[nn.Module]], Map | None]) -> None:
        attention, mlp = block.self_attn, block.mlp
        self.layer, self.scale, self.K = attention.layer_idx, attention.scaling, attention.head_dim
        self.R = attention.num_key_value_groups
        self.norm, self.feed_norm, self.act = block.input_layernorm, block.post_attention_layernorm, mlp.act_fn
        self.head_norms = [attention.q_norm, attention.k_norm] if hasattr(attention, "q_norm") else []
        self._pack, self.joined = pack, list[nn.Module]()
        self.qkv = self._join(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out, self.down = self._join(attention.o_proj), self._join(mlp.down_proj)
        self.gate_up = self._join(mlp.gate_proj, mlp.up_proj)

    def _join(self, *modules: nn.Module) -> Map:
        packed = self._pack(modules)
        self.joined += modules if packed else ()
        return packed or (lambda x: torch.cat([one(x) for one in modules], -1))

    def __call__(self, block: nn.Module, x: Tensor, *others: Any, cache: Any = None, **options: Any) -> Tensor:
        if x.shape[:2] != (1, 1) or cache is None:
            out: Tensor = type(block).forward(block, x, *others, cache=cache, **options)
            return out
        x = x + self.out(self._attended(self.qkv(self.norm(x)), options["position_embeddings"], cache))
        gate, up = self.gate_up(self.feed_norm(x)).chunk(2, -1)
        return x + self.down(self.act(gate) * up)

    def _attended(self, qkv: Tensor, turn: tuple[Tensor, Tensor], cache: Any) -> Tensor:
        """(1, 1, H·K) for qkv (1, 1, (H + 2G)·K); turn: cosines and sines of the token's place, (1, 1, K) each."""
        cos, sin = turn
        heads = qkv.view(-1, self.K)  # (GR + 2G, K)
        G = len(heads) // (self.R + 2)
        turned, v = heads[:-G], heads[-G:]
        if self.head_norms:
            parts = zip(self.head_norms, turned.split([G * self.R, G]), strict=True)  # type: ignore[no-untyped-call]
            turned = torch.cat([norm(part) for norm, part in parts])
        half = self.K // 2
        ahead = torch.cat((-sin[0, :, :half], sin[0, :, half:]), -1)
        turned = turned * cos[0] + turned.roll(half, -1) * ahead  # Su et al. 2021, §3.4.2, its halves in two runs
        keys, values = cache.update(turned[None, -G:, None], v[None, :, None], self.layer)
        q = turned[:-G].view(1, G, self.R, self.K)
        return F.scaled_dot_product_attention(q, keys, values, scale=self.scale).view(1, 1, -1)
