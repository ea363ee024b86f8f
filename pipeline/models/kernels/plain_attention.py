"""What attention computes, in plain torch: scores under a causal mask, a window, a cap and sinks.

B batch, T queries, S keys, K head size, H query heads, of which R = H/G share each of the G key and
value heads.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.models.device import to_device
from pipeline.models.kernels import suits_flash_attention, uses_cpu_kernels

Pairs = list[tuple[Tensor, Tensor]]  # keys and values of each sequence


@dataclass(frozen=True)
class Rule:
    """How scores become weights, apart from the causal mask."""

    scale: float
    window: int | None = None  # keys that a query sees, its own included
    softcap: float | None = None
    sinks: Tensor | None = None  # (H,): one more score per head, whose weight goes to no value

    @property
    def explicit(self) -> bool:
        """Whether the scores themselves must be changed, which fused attention cannot do."""
        return self.softcap is not None or self.sinks is not None

    @property
    def plain(self) -> bool:
        """Whether it is the causal mask alone."""
        return self.window is None and not self.explicit


def split_sequences(k: Tensor, v: Tensor, spans: list[int]) -> Pairs:
    """Keys and values of each sequence."""
    return [*zip(k.split_with_sizes(spans, 2), v.split_with_sizes(spans, 2), strict=True)]


def attend_each(q: Tensor, pairs: Pairs, lengths: list[int], rule: Rule) -> Tensor:
    """(1, T, H, K): a call for each sequence."""
    parts = zip(q.split_with_sizes(lengths, 2), pairs, strict=True)
    return torch.cat([attend_row(x, *pair, rule).transpose(1, 2) for x, pair in parts], 1)


def attend_row(q: Tensor, k: Tensor, v: Tensor, rule: Rule) -> Tensor:
    """(B, H, T, K), each row one sequence."""
    B, H, T, K = q.shape
    G, S = k.shape[1:3]
    if rule.explicit:
        return attend_explicit(q, k, v, rule, visible_keys(T, S, rule.window, q.device))
    plain = (T == S or T == 1) and (rule.window is None or rule.window >= S)
    if plain and T == 1:
        # A group's R heads take the place of tokens, so that no kernel repeats keys and values: 2 ×
        # as fast as torch's enable_gqa after 32 tokens, 5 × after 256 (measured on the CPU with
        # SmolLM2's 9 heads in 3 groups, bf16).
        grouped = q.reshape(B, G, H // G, K)  # (B, G, R, K)
        return F.scaled_dot_product_attention(grouped, k, v, scale=rule.scale).reshape(B, H, 1, -1)
    mask = None if plain else visible_keys(T, S, rule.window, q.device)
    if not uses_cpu_kernels(q.device):
        # not loaded on a CPU
        from pipeline.models.kernels.repeatable import RepeatableAttention, supports_repeatable

        repeats = plain and supports_repeatable(q, k, v)
        if H != G and (repeats or not suits_flash_attention(q, v)):
            # only flash attention reads shared heads; without it torch would fall back to scores of
            # T × T
            k, v = (x.repeat_interleave(H // G, 1) for x in (k, v))
            G = H
        if repeats:
            out: Tensor = RepeatableAttention.apply(q, k, v, rule.scale)  # type: ignore[no-untyped-call]
            return out
    return F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=plain, scale=rule.scale, enable_gqa=H != G
    )


def attend_explicit(q: Tensor, k: Tensor, v: Tensor, rule: Rule, visible: Tensor) -> Tensor:
    """(B, H, T, K) from the scores themselves, so that they can be capped and extended by sinks."""
    B, H, T, _ = q.shape
    G, S = k.shape[1:3]
    weights = attention_weights(q, k, rule, visible).to(q.dtype).view(B, G, H // G, T, S)
    return (weights @ v.unsqueeze(2)).flatten(1, 2)  # (B, G, R, T, K) → (B, H, T, K)


def attention_weights(q: Tensor, k: Tensor, rule: Rule, visible: Tensor) -> Tensor:
    """softmax of the scores as `rule` says, (B, H, T, S) in fp32; `visible` is (T, S)."""
    B, H, T, _ = q.shape
    G, S = k.shape[1:3]
    grouped = q.reshape(B, G, H // G, T, -1)  # (B, G, R, T, K)
    scores = grouped @ k.unsqueeze(2).transpose(3, 4) * rule.scale  # (B, G, R, T, S)
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    scores = scores.float().masked_fill(~visible, -torch.inf)
    if rule.sinks is not None:
        sinks = rule.sinks.float().view(1, G, H // G, 1, 1).expand(B, -1, -1, T, 1)
        scores = torch.cat([scores, sinks], -1)  # (B, G, R, T, S + 1)
    # without the sink's share; (B, G, R, T, S) → (B, H, T, S)
    return scores.softmax(-1)[..., :S].flatten(1, 2)


def visible_keys(T: int, S: int, window: int | None, device: torch.device) -> Tensor:
    """(T, S), True where a query sees a key."""
    # query t has position S - T + t
    visible = torch.ones(T, S, dtype=torch.bool, device=device).tril(S - T)
    return visible if window is None else visible.triu(S - T - window + 1)


@lru_cache(maxsize=4)  # all layers of a forward use the same, also when they run again in backward
def sequence_starts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """Where each sequence begins, and the end of the last: int32 on the device."""
    return to_device(torch.tensor([*accumulate(lengths, initial=0)], dtype=torch.int32), device)
